"""Stages 4 and 5: the generator learns from videos that it makes itself, as it will make them: four steps a block, over
its own K/V cache.

A teacher, the generator of stage 3, is shown the student's own past and the noisy latents that the student has at one
of its steps; it follows the flow from there to the end in many small steps, with classifier-free guidance. The student
is to arrive at the same place in one. So it learns the teacher's result for whatever its own past has become, and the
teacher, trained on pasts under noise, pulls what has drifted back to what it knows.

Stage 4 does this for all weights on videos of a few seconds. Stage 5 for a LoRA, on videos of a minute and more in
which the prompt changes and the cache is refreshed: the video streams on, and the loss is on its newest block only.
"""

import copy
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from demo.training import generator as stage2
from demo.training.clips import BLOCK, Captions
from demo.training.generator import GENERATOR, SHIFT, SINK, WINDOW, new_rope
from demo.training.progress import Average, Progress, Repeated, cosine, set_rate
from demo.training.ranks import Ranks
from demo.world import HEIGHT, WIDTH, sample
from pipeline.sampler import shifted_sigma, timesteps
from wan.geometry import PIXELS
from wan.kv_cache import KVCache
from wan.model import CausalWan
from wan.text_encoder import encode

SIGMAS = [t / 1000 for t in timesteps([1000, 750, 500, 250], SHIFT, warp=True)]  # of the student's four steps
GUIDANCE = 2.5
TEACHER_STEPS = 8  # from pure noise; fewer from less
BLUR = 0.1  # σ of the noise on the past that the teacher is shown
SOFT = 0.1  # where the loss goes over from square to absolute
RANK = 16
FARTHEST = 1000  # latents; how far from the sink stage 5 lets a video's window get
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
    def __call__(self, x: Tensor, sigma: float, past: Tensor, embeds: Tensor) -> Tensor:
        """x [B, F, 16, h, w] at σ, the clean blocks of the past that the cache would hold [n, B, F, 16, h, w], embeds
        [B, n, dim] → x0."""
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

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.start = cache.slots[0] * cache.tokens
        self.end = self.start + BLOCK * cache.tokens

    def room(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.room(layer)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        every = self.cache.update(layer, k.detach(), v.detach())
        return tuple(torch.cat([x[:, :self.start], own.to(x.dtype), x[:, self.end:]], 1)
                     for x, own in zip(every, (k, v), strict=True))


class Videos:
    """A batch of videos in the making, as `Session` makes one: noise, cache, prompts, latest latents.

        videos.begin(); x0 = videos.denoise(); videos.remember(x0); videos.finish(x0)

    What `denoise` and `remember` compute with stays where it is in memory, from one video to the next too, so that they
    can be recorded as CUDA graphs, one for each `cache.slots`. The other two keep the books.
    """

    def __init__(self, fast: CausalWan, embeds: Tensor):
        self.fast, self.embeds = fast, embeds.clone()
        weight = fast.patch_embedding.weight
        self.cache = new_cache(len(embeds), weight.device.type, weight.dtype)
        self.rope = new_rope(weight.device.type)
        self.text = fast.encode_text(embeds)
        self.turns = self.rope.turns(0, BLOCK)  # of the present block
        shape = (len(embeds), BLOCK, GENERATOR.in_dim, HEIGHT // PIXELS, WIDTH // PIXELS)
        self.shown = torch.zeros(WINDOW - 1, *shape, device=embeds.device)  # the blocks that the present one attends to
        self.latest = torch.zeros(shape, device=embeds.device)
        self.restart(embeds)

    def restart(self, embeds: Tensor) -> None:
        """New videos in place of these."""
        self.block = 0
        self.ahead = 0  # latents that all but the sink are further from the start than they were made
        self.sink: list[Tensor] = []
        self.recent: list[Tensor] = []  # the latest WINDOW blocks
        self.cache.rewind(keep_sink=False)
        self._tell(embeds)

    def position(self, block: int) -> int:
        """Index of a block's first latent."""
        return BLOCK * block + self.ahead

    def past(self) -> Tensor:
        """What the present block attends to, the sink and the latest of the window: clean blocks [n, B, F, C, h, w]."""
        return self.shown[:min(self.block, WINDOW - 1)]

    def begin(self) -> None:
        """The next block."""
        position = self.position(self.block)
        self.cache.begin(position, BLOCK)
        self.turns.copy_(self.rope.turns(position, BLOCK))
        rest = min(self.block - SINK, WINDOW - SINK - 1)
        for place, latents in zip(self.past(), self.sink + self.recent[len(self.recent) - max(0, rest):], strict=True):
            place.copy_(latents)

    def denoise(self, flow: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """The block's latents, by four steps from noise. flow(step, noisy latents): in place of the videos' own."""
        x = torch.randn_like(self.latest)
        for i, sigma in enumerate(SIGMAS):
            x0 = x - sigma * (flow(i, x) if flow else self.flow(x, sigma))
            if i + 1 < len(SIGMAS):
                x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * torch.randn_like(x0)
        return x0

    def flow(self, x: Tensor, sigma: float, model: CausalWan | None = None, cache: Tape | None = None,
             text: list | None = None) -> Tensor:
        """The flow of the block's latents x at σ: of the videos' own model, or of another over the same cache."""
        times = torch.full(x.shape[:2], 1000 * sigma, dtype=torch.float64, device=x.device)
        return (model or self.fast).flow(x, times, self.turns, cache or self.cache, text or self.text)

    def remember(self, x0: Tensor) -> None:
        """Leaves the block's clean K/V in the cache, and its latents in `latest`."""
        self.flow(x0, 0.0)
        self.latest.copy_(x0)

    def finish(self, x0: Tensor) -> None:
        """Goes on to the next block."""
        if self.block < SINK:
            self.sink.append(x0)
        self.recent = [*self.recent, x0][-WINDOW:]
        self.block += 1

    def switch(self, embeds: Tensor) -> None:
        """New prompts from the next block on, with a re-cache."""
        self._tell(embeds)
        self._refresh(keep_sink=self.block > WINDOW)

    def jump(self, latents: int) -> None:
        """Moves the window so far away from the sink, as if all that time had gone by."""
        self.ahead += latents
        self._refresh(keep_sink=True)

    def _tell(self, embeds: Tensor) -> None:
        self.embeds.copy_(embeds)
        for kept, new in zip(self.text, self.fast.encode_text(embeds), strict=True):
            for place, values in zip(kept, new, strict=True):
                place.copy_(values)

    def _refresh(self, keep_sink: bool) -> None:
        blocks = self.recent[SINK:] if keep_sink else self.recent
        first = self.position(self.block - len(blocks))
        self.cache.rewind(keep_sink)
        self.cache.begin(first, BLOCK * len(blocks))
        self.fast(torch.cat(blocks, 1), 0.0, first, self.rope, self.cache, self.text)


class Lesson:
    """A step of training: makes the next block of the videos, and compares the student with the teacher at one of its
    four steps. Leaves the gradients in the trained weights."""

    def __init__(self, student: CausalWan, teacher: Teacher, videos: Videos, trained: list[Tensor], device: str):
        self.student, self.teacher, self.videos, self.trained, self.device = student, teacher, videos, trained, device
        for value in trained:
            value.grad = torch.zeros_like(value)
        self.pool = None if device == "cpu" else torch.cuda.graph_pool_handle()
        self.work: dict[tuple, Repeated] = {}

    def __call__(self, chosen: int) -> Tensor:
        """The student's distance from the teacher at its step number `chosen`."""
        self.videos.begin()
        key = (chosen, *self.videos.cache.slots)
        if key not in self.work:
            self.work[key] = Repeated(partial(self._learn, chosen), self.device, warm=1, pool=self.pool)
        loss = self.work[key]()["loss"]
        self.videos.finish(self.videos.latest.clone())
        return loss

    def _learn(self, chosen: int) -> dict[str, Tensor]:
        videos, student, losses = self.videos, self.student, []
        torch._foreach_zero_([value.grad for value in self.trained])

        def flow(step: int, x: Tensor) -> Tensor:
            sigma = SIGMAS[step]
            if step != chosen:
                return videos.flow(x, sigma)
            target = self.teacher(x, sigma, videos.past(), videos.embeds)
            with torch.enable_grad():
                with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu", cache_enabled=False):
                    made = videos.flow(x, sigma, student, Tape(videos.cache), student.encode_text(videos.embeds))
                error = x - sigma * made.float() - target
                losses.append(((error.square() + SOFT**2).sqrt() - SOFT).mean())
            return made.float().detach()

        with torch.no_grad():
            videos.remember(videos.denoise(flow))
        losses[0].backward()
        return {"loss": losses[0].detach()}


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
    teachers = stage2.latest(folder, stage2.RESULTS[1:])
    teacher_model, text, words = stage2.load(folder, device, teachers)
    student = stage2.load(folder, device, "distilled.pt" if lora else teachers)[0]
    fast = copy.deepcopy(student).to(dtype).requires_grad_(False)
    trained = add_lora(student, RANK) if lora else student
    average = Average(trained, 0.99).to(device)
    weights = list(trained.parameters())
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=device != "cpu")
    progress = Progress(folder, stage, steps, {"trained": trained, "average": average, "optimiser": optimiser},
                        quiet=not ranks.first)
    same = random.Random(seed)  # what takes longer or shorter is the same on all GPUs
    seed += 1000003 * ranks.rank
    torch.manual_seed(seed)
    teacher = Teacher(teacher_model.to(dtype).requires_grad_(False), embed(text, words.ids([""]).to(device)), batch,
                      dtype)
    sources = [attrgetter(name) for name, _ in fast.named_parameters()]
    rng, prompts = random.Random(seed), torch.Generator().manual_seed(seed)
    videos = lesson = scenes = next_switch = None

    def told(scenes: Tensor) -> Tensor:
        return embed(text, words.of(scenes, rng).to(device))

    for step in progress:
        with torch.no_grad():
            torch._foreach_copy_(list(fast.parameters()), [source(student) for source in sources])
            if videos is None or videos.block >= blocks:
                scenes = sample(batch, 1, prompts)[:, 0]
                if videos is None:
                    videos = Videos(fast, told(scenes))
                    lesson = Lesson(student, teacher, videos, weights, device)
                else:
                    videos.restart(told(scenes))
                next_switch = same.randint(*switch_every) if switch_every else None
            elif videos.block == next_switch:
                scenes = successors(scenes, prompts)
                videos.switch(told(scenes))
                next_switch += same.randint(*switch_every)
            elif lora and videos.block > WINDOW and same.random() < JUMPS:
                videos.jump(BLOCK * same.randrange(max(1, (FARTHEST - videos.ahead) // BLOCK)))
        set_rate(optimiser, cosine(step, steps, rate, warm=min(50, steps // 10 + 1)))
        chosen = same.randrange(len(SIGMAS))
        loss = lesson(chosen)
        ranks.average_gradients(weights)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
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
