"""Stages 3 and 4: the generator learns from videos that it makes itself, as it will make them: four steps a block, over
its own K/V cache.

A teacher, the generator of stage 2, is shown the student's own past and the noisy latents that the student has at one
of its steps; it follows the flow from there to the end in many small steps, with classifier-free guidance. The student
is to arrive at the same place in one. So it learns the teacher's result for whatever its own past has become, and the
teacher, trained on pasts under noise, pulls what has drifted back to what it knows.

Stage 3 does this for all weights on videos of a few seconds. Stage 4 for a LoRA, on videos of a minute and more in
which the prompt changes and the cache is refreshed: the video streams on, and the loss is on its newest block only.
"""

import copy
import random
from collections.abc import Callable
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from demo.training import generator as stage2
from demo.training.clips import BLOCK, Captions
from demo.training.generator import GENERATOR, SHIFT, SINK, WINDOW, new_rope
from demo.training.progress import Average, Progress, cosine, set_rate
from demo.training.ranks import Ranks
from demo.world import HEIGHT, WIDTH, sample
from pipeline.sampler import shifted_sigma, timesteps
from wan.geometry import PIXELS
from wan.kv_cache import KVCache
from wan.model import CausalWan
from wan.text_encoder import encode

SIGMAS = [t / 1000 for t in timesteps([1000, 750, 500, 250], SHIFT, warp=True)]  # of the student's four steps
GUIDANCE = 2.0
TEACHER_STEPS = 8  # from pure noise; fewer from less
BLUR = 0.1  # σ of the noise on the past that the teacher is shown
SOFT = 0.1  # where the loss goes over from square to absolute
RANK = 16
FARTHEST = 1000  # latents; how far from the sink stage 4 lets a video's window get
JUMPS = 0.03  # how often, of the blocks, it jumps ahead


def new_cache(batch: int, device: str, dtype: torch.dtype) -> KVCache:
    _, ph, pw = GENERATOR.patch_size
    return KVCache(layers=GENERATOR.num_layers, batch=batch, tokens=(HEIGHT // PIXELS // ph) * (WIDTH // PIXELS // pw),
                   heads=GENERATOR.num_heads, head_dim=GENERATOR.head_dim, window=WINDOW * BLOCK, sink=SINK * BLOCK,
                   dtype=dtype, device=device)


class Teacher:
    """Where the flow leads: the endpoint of the guided flow from the student's noisy latents."""

    def __init__(self, model: CausalWan, nothing: Tensor, batch: int, dtype: torch.dtype):
        self.model, self.nothing = model, nothing
        self.rope = new_rope(nothing.device.type)
        self.cache = new_cache(2 * batch, nothing.device.type, dtype)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float, past: list[Tensor], embeds: Tensor) -> Tensor:
        """x [B, F, 16, h, w] at σ, the clean blocks of the past that the cache would hold, embeds [B, n, dim] → x0."""
        text = self.model.encode_text(torch.cat([embeds, self.nothing.expand_as(embeds)]))
        self.cache.rewind(keep_sink=False)
        for block, latents in enumerate(past):
            shown = (1 - BLUR) * latents + BLUR * torch.randn_like(latents)
            self._forward(shown, BLUR, block, text, begin=True)
        self.cache.begin(BLOCK * len(past), BLOCK)
        s = sigma / (SHIFT - (SHIFT - 1) * sigma)  # before the shift
        count = max(3, round(TEACHER_STEPS * s))
        sigmas = [shifted_sigma(s * (1 - i / count), SHIFT) for i in range(count + 1)]
        for here, there in pairwise(sigmas):
            told, untold = self._forward(x, here, len(past), text).chunk(2)
            x = x - (here - there) * (untold + GUIDANCE * (told - untold))
        return x

    def _forward(self, x: Tensor, sigma: float, block: int, text: list, begin: bool = False) -> Tensor:
        if begin:
            self.cache.begin(BLOCK * block, BLOCK)
        return self.model(torch.cat([x, x]), 1000 * sigma, BLOCK * block, self.rope, self.cache, text)


class Tape:
    """A K/V cache that lets gradients through the block that is being written."""

    def __init__(self, cache: KVCache, position: int):
        self.cache = cache
        self.start = cache.positions.index(position) * cache.tokens
        self.end = self.start + BLOCK * cache.tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        every = self.cache.update(layer, k.detach(), v.detach())
        return tuple(torch.cat([x[:, :self.start], own.to(x.dtype), x[:, self.end:]], 1)
                     for x, own in zip(every, (k, v), strict=True))


class Videos:
    """A batch of videos in the making, as `Session` makes one: noise, cache, prompts, latest latents."""

    def __init__(self, fast: CausalWan, embeds: Tensor):
        self.fast, self.embeds = fast, embeds
        weight = fast.patch_embedding.weight
        self.cache = new_cache(len(embeds), weight.device.type, weight.dtype)
        self.rope = new_rope(weight.device.type)
        self.block = 0
        self.ahead = 0  # latents that all but the sink are further from the start than they were made
        self.sink: list[Tensor] = []
        self.recent: list[Tensor] = []  # the latest WINDOW blocks
        self.text = fast.encode_text(embeds)

    def position(self, block: int) -> int:
        """Index of a block's first latent."""
        return BLOCK * block + self.ahead

    def past(self) -> list[Tensor]:
        """What the next block will attend to: the sink and the latest of the window."""
        rest = min(self.block - SINK, WINDOW - SINK - 1)
        return self.sink + self.recent[len(self.recent) - rest:] if rest > 0 else self.sink

    def denoise(self, flow: Callable[[int, Tensor, int], Tensor] | None = None) -> Tensor:
        """The next block's latents, by four steps from noise. flow(step, noisy latents, position): in place of the
        videos' own model."""
        position = self.position(self.block)
        self.cache.begin(position, BLOCK)
        x = torch.randn(len(self.embeds), BLOCK, GENERATOR.in_dim, HEIGHT // PIXELS, WIDTH // PIXELS,
                        device=self.embeds.device)
        for i, sigma in enumerate(SIGMAS):
            x0 = x - sigma * (flow(i, x, position) if flow else self.forward(x, sigma, position))
            if i + 1 < len(SIGMAS):
                x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * torch.randn_like(x0)
        return x0

    def finish(self, x0: Tensor) -> None:
        """Takes the block's latents, and leaves their clean K/V in the cache."""
        self.forward(x0, 0.0, self.position(self.block))
        if self.block < SINK:
            self.sink.append(x0)
        self.recent = [*self.recent, x0][-WINDOW:]
        self.block += 1

    def switch(self, embeds: Tensor) -> None:
        """New prompts from the next block on, with a re-cache."""
        self.embeds, self.text = embeds, self.fast.encode_text(embeds)
        self._refresh(keep_sink=self.block > WINDOW)

    def jump(self, latents: int) -> None:
        """Moves the window so far away from the sink, as if all that time had gone by."""
        self.ahead += latents
        self._refresh(keep_sink=True)

    def _refresh(self, keep_sink: bool) -> None:
        blocks = self.recent[SINK:] if keep_sink else self.recent
        first = self.position(self.block - len(blocks))
        self.cache.rewind(keep_sink)
        self.cache.begin(first, BLOCK * len(blocks))
        self.forward(torch.cat(blocks, 1), 0.0, first)

    def forward(self, x: Tensor, sigma: float, position: int) -> Tensor:
        return self.fast(x, 1000 * sigma, position, self.rope, self.cache, self.text)


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): a weight plus B·A, alpha = rank."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) * weight.shape[1] ** -0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def add_lora(model: CausalWan, rank: int) -> nn.ModuleDict:
    """Puts a LoRA on every Linear of the blocks, freezes all else. Returns them, by names with / for dots."""
    model.requires_grad_(False)
    added = nn.ModuleDict()
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            added[name.replace(".", "/")] = low = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", low)
    return added


def train(folder: Path, ranks: Ranks, stage: str, *, steps: int, device: str, seed: int = 0, batch: int = 64,
          rate: float, lora: bool, blocks: int, switch_every: tuple[int, int] | None) -> None:
    """Trains on videos of `blocks` blocks; writes STAGE.pt. switch_every: least and most blocks between switches."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    teacher_model, text, words = stage2.load(folder, device)
    student = stage2.load(folder, device, "distilled.pt" if lora else "generator.pt")[0]
    fast = copy.deepcopy(student).to(dtype).requires_grad_(False)
    trained = add_lora(student, RANK) if lora else student
    average = Average(trained, 0.99).to(device)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    progress = Progress(folder, stage, steps, {"trained": trained, "average": average, "optimiser": optimiser},
                        quiet=not ranks.first)
    seed += 1000003 * ranks.rank
    torch.manual_seed(seed)
    teacher = Teacher(teacher_model.to(dtype).requires_grad_(False), embed(text, words.ids([""]).to(device)), batch,
                      dtype)
    sources = [attrgetter(name) for name, _ in fast.named_parameters()]
    rng, prompts = random.Random(seed), torch.Generator().manual_seed(seed)
    videos, scenes, next_switch = None, None, None
    for step in progress:
        with torch.no_grad():
            torch._foreach_copy_(list(fast.parameters()), [source(student) for source in sources])
            if videos is None or videos.block >= blocks:
                scenes = sample(batch, 1, prompts)[:, 0]
                videos = Videos(fast, embed(text, words.of(scenes, rng).to(device)))
                next_switch = rng.randint(*switch_every) if switch_every else None
            elif videos.block == next_switch:
                scenes = successors(scenes, prompts)
                videos.switch(embed(text, words.of(scenes, rng).to(device)))
                next_switch += rng.randint(*switch_every)
            elif lora and videos.block > WINDOW and rng.random() < JUMPS:
                videos.jump(BLOCK * rng.randrange(max(1, (FARTHEST - videos.ahead) // BLOCK)))
        set_rate(optimiser, cosine(step, steps, rate, warm=min(50, steps // 10 + 1)))
        chosen = rng.randrange(len(SIGMAS))
        loss = forced_block(student, teacher, videos, chosen, device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average_gradients(list(trained.parameters()))
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        average.update(trained, step)
        progress.log(**{"loss": loss, f"step{chosen + 1}": loss * len(SIGMAS)})
    average.copy_to(trained)
    if not ranks.first:
        pass
    elif lora:
        torch.save({"lora": {name.replace("/", "."): {"A": low.A.detach(), "B": low.B.detach()}
                             for name, low in trained.items()}}, folder / f"{stage}.pt")
    else:
        stage2.save(folder / f"{stage}.pt", student, text)
    ranks.wait()


def embed(text: nn.Module, ids: Tensor) -> Tensor:
    """Token ids [N, n] → embeddings [N, n, dim], zero after the end."""
    with torch.no_grad():
        return encode(text, ids, (ids > 0).long())


def successors(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes [B, 6] that differ from these in one to three attributes."""
    return sample(len(scenes), 2, generator, first=scenes)[:, 1]


def forced_block(student: CausalWan, teacher: Teacher, videos: Videos, chosen: int, device: str) -> Tensor:
    """Makes the next block of the videos; returns the student's distance from the teacher at one of its steps."""
    losses = []

    def flow(step: int, x: Tensor, position: int) -> Tensor:
        sigma = SIGMAS[step]
        if step != chosen:
            return videos.forward(x, sigma, position)
        target = teacher(x, sigma, videos.past(), videos.embeds)
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            made = student(x, 1000 * sigma, position, videos.rope, Tape(videos.cache, position),
                           student.encode_text(videos.embeds))
            x0 = x - sigma * made.float()
            losses.append((((x0 - target).square() + SOFT**2).sqrt() - SOFT).mean())
        return made.float().detach()

    with torch.no_grad():
        videos.finish(videos.denoise(flow))
    return losses[0]


def load_student(folder: Path, stage: str, device: str) -> tuple[CausalWan, nn.Module, Captions]:
    """The generator that a stage made, with its LoRA where it has one; text encoder and captions."""
    student, text, words = stage2.load(folder, device, "distilled.pt" if stage == "streaming" else f"{stage}.pt")
    if stage == "streaming":
        added = add_lora(student, RANK)
        for name, parts in torch.load(folder / f"{stage}.pt", map_location=device, weights_only=True)["lora"].items():
            added[name.replace(".", "/")].load_state_dict(parts)
        for name in added:
            parametrize.remove_parametrizations(student.get_submodule(name.replace("/", ".")), "weight")
    return student, text, words
