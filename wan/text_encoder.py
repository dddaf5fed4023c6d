import html
import re

import ftfy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


def clean_prompt(prompt: str) -> str:
    """Text as Wan's encoder was trained on it: mis-decoded characters mended, HTML unescaped, white space collapsed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class TextEncoder:
    """UMT5 encoder and its tokenizer: a prompt → its embeddings."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self.model, self.tokenizer, self.max_tokens = model.eval().requires_grad_(False), tokenizer, max_tokens

    def tokens(self, prompt: str) -> list[int]:
        """Token ids, the end token included, as many as the prompt has (maybe more than `max_tokens`)."""
        return self.tokenizer(clean_prompt(prompt), add_special_tokens=True, truncation=False, verbose=False).input_ids

    def overflow(self, prompt: str) -> tuple[int, str]:
        """How many tokens the prompt has, and the end of it that does not fit ("" where all of it does)."""
        ids = self.tokens(prompt)
        if len(ids) <= self.max_tokens:
            return len(ids), ""
        return len(ids), self.tokenizer.decode(ids[self.max_tokens - 1:], skip_special_tokens=True)

    @torch.inference_mode()
    def __call__(self, prompt: str) -> Tensor:
        """Embeddings [1, n, d_model] of the prompt's n ≤ max_tokens tokens.

        The tokens after a prompt's end are masked, so leaving them out gives the same embeddings; the generator pads
        with zeros.
        """
        batch = self.tokenizer(clean_prompt(prompt), add_special_tokens=True, truncation=True,
                               max_length=self.max_tokens, return_tensors="pt").to(self.model.device)
        return encode(self.model, batch.input_ids, batch.attention_mask)


def encode(model: UMT5EncoderModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """ids, mask [N, L] → embeddings [N, L, d_model], zero where the mask is."""
    embeds = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return embeds * attention_mask[..., None].to(embeds.dtype)
