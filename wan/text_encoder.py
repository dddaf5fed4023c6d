import html
import re

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor

from wan.umt5 import UMT5Encoder


def clean_prompt(prompt: str) -> str:
    """Text as Wan's encoder was trained on it: mis-decoded characters mended, HTML unescaped, white space collapsed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class TextEncoder:
    """UMT5 encoder and its tokenizer: a prompt → its embeddings."""

    def __init__(self, model: UMT5Encoder, tokenizer: Tokenizer, max_tokens: int):
        self.model, self.tokenizer, self.max_tokens = model.eval().requires_grad_(False), tokenizer, max_tokens

    def tokens(self, prompt: str) -> list[int]:
        """Token ids, the end token included, as many as the prompt has (maybe more than `max_tokens`)."""
        return self.tokenizer.encode(clean_prompt(prompt)).ids

    def overflow(self, prompt: str) -> tuple[int, str]:
        """How many tokens the prompt has, and the end of it that does not fit ("" where all of it does)."""
        ids = self.tokens(prompt)
        if len(ids) <= self.max_tokens:
            return len(ids), ""
        return len(ids), self.tokenizer.decode(ids[self.max_tokens - 1:], skip_special_tokens=True)

    @torch.inference_mode()
    def __call__(self, prompt: str) -> Tensor:
        """Embeddings [1, n, d_model] of the prompt's n ≤ max_tokens tokens.

        The tokens after a prompt's end are masked in Wan's training, so leaving them out gives the same embeddings; the
        generator pads with zeros.
        """
        *words, end = self.tokens(prompt)
        ids = [*words[: self.max_tokens - 1], end]
        return self.model(torch.tensor([ids], device=self.model.shared.weight.device))
