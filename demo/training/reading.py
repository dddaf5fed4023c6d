"""The text encoder learns to read before anything is drawn, as Wan's UMT5 had long learned: what a caption says of each
attribute of its scene. The heads that answer are thrown away; the generator's stage trains the encoder on."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from demo.training.clips import Captions
from demo.training.progress import Progress, cosine, set_rate
from demo.world import CATEGORIES, CHOICES, sample


def read(text: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Token ids [N, n], 0 where there is none → embeddings [N, n, dim], zero there. Without a look at the mask on the
    host, so that it can be recorded as a CUDA graph."""
    mask = ids > 0
    dtype = text.dtype
    hidden = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)[:, None, None].expand(-1, 1, ids.shape[1], -1)
    embeds = text(input_ids=ids, attention_mask=hidden).last_hidden_state
    return embeds * mask[..., None]


class Answers(nn.Module):
    """For each attribute a linear layer on the mean over a caption's words. So each word's embedding comes to hold what
    the whole caption says, and a generator whose attention knows nothing yet, and looks at all alike, is told too."""

    def __init__(self, dim: int):
        super().__init__()
        self.choices = nn.ModuleList(nn.Linear(dim, len(CHOICES[name])) for name in CATEGORIES)

    def forward(self, embeds: Tensor, mask: Tensor) -> list[Tensor]:
        """embeds [B, n, dim], mask [B, n], true where there is a word → for each attribute [B, choices]."""
        mean = (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return [choice(mean) for choice in self.choices]


def train(folder: Path, text: UMT5EncoderModel, words: Captions, *, steps: int, device: str, seed: int = 0,
          captions: int = 32768, batch: int = 512, rate: float = 2e-3) -> None:
    """Trains `text` in place, on captions of scenes that are not held out. Done once, it is only loaded again."""
    torch.manual_seed(seed)
    answers = Answers(text.config.d_model).to(device)
    optimiser = torch.optim.AdamW([*text.parameters(), *answers.parameters()], lr=rate, betas=(0.9, 0.98),
                                  weight_decay=0.0)
    progress = Progress(folder, "reading", steps, {"text": text, "answers": answers, "optimiser": optimiser})
    scenes = sample(captions, 1, torch.Generator().manual_seed(seed + 32452843))[:, 0]
    ids, scenes = words.of(scenes, random.Random(seed)).to(device), scenes.to(device)
    for step in progress:
        set_rate(optimiser, cosine(step, steps, rate, warm=min(100, steps // 10 + 1)))
        index = torch.randint(captions, (batch,), device=device)
        mask = ids[index] > 0
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            embeds = read(text, ids[index]).float()
        told = answers(embeds, mask)
        loss = sum(F.cross_entropy(told[i], scenes[index, i]) for i in range(len(told))) / len(told)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        optimiser.step()
        right = torch.stack([told[i].argmax(1) == scenes[index, i] for i in range(len(told))]).float().mean()
        progress.log(loss=loss, right=right)
