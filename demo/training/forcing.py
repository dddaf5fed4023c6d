"""Stages 4, 5 and 7: the generator learns from videos that it makes itself, as it will make them: four steps a block,
over its own K/V cache (Self Forcing, Huang et al. 2025, arXiv:2506.08009). A teacher, the generator of stage 3, is
shown the student's own past and judges what the student makes at one of its steps.

Stage 4 teaches it to get in one step to where the teacher gets in many; stage 5 to make videos such as the teacher's,
whichever. Both train all weights, on videos of a few seconds. Stage 7 goes on so with a LoRA, on videos of a minute and
more in which the prompt changes and the cache is refreshed: the video streams on, and the loss is on its newest block,
also that of the witness of stage 6.
"""

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from demo.training import generator as stage2
from demo.training.clips import BLOCK, Captions
from demo.training.generator import WINDOW
from demo.training.lora import RANK, add_lora
from demo.training.progress import Average, Progress, Repeated, cosine, set_rate
from demo.training.ranks import Ranks
from demo.training.rollout import SIGMAS, Tape, Videos, embed
from demo.training.teacher import Critic, Following, Matching, Teacher
from demo.training.witness import Witnessed
from demo.world import sample
from wan.model import CausalWan

FARTHEST = 1000  # latents; how far from the sink a LoRA's video lets its window get
JUMPS = 0.03  # how often, of the blocks, it jumps ahead


@dataclass(frozen=True)
class Stage:
    """How a stage trains. rate: of learning. blocks: of a video. critic: its rate, where what the student makes is to
    be distributed as what the teacher makes; 0 where the student is to follow the teacher. switch_every: least and
    most blocks between prompts, of videos in turn. critic_first: steps in which only the critic learns. witness: weight
    of a witness's loss, 0: none. decay: of the running mean of the weights."""

    rate: float
    blocks: int
    critic: float = 0.0
    critic_first: int = 0
    witness: float = 0.0
    lora: bool = False
    switch_every: tuple[tuple[int, int], ...] = ()
    decay: float = 0.99
    betas: tuple[float, float] = (0.9, 0.98)


STAGES = {
    "distilled": Stage(rate=3e-4, blocks=7),
    "matched": Stage(rate=1e-4, blocks=7, critic=2e-4, critic_first=100, decay=0.995, betas=(0.0, 0.99)),
    "streaming": Stage(rate=4e-4, blocks=100, critic=1e-4, critic_first=100, lora=True, decay=0.995, betas=(0.0, 0.99),
                       witness=0.06, switch_every=((4, 14), (30, 100))),
}
CRITIC = "critic.pt"  # as the latest stage left it
LORA_BEFORE = "lora_before.pt"  # where there is one, a LoRA is trained on


class Lesson:
    """A step of training: makes the next block of the videos, and a loss of what the student makes at one of its four
    steps. Leaves the gradients in the trained weights. loss: `Following` or `Matching`."""

    def __init__(self, student: CausalWan, loss: Callable, videos: Videos, trained: list[Tensor], device: str):
        self.student, self.loss, self.videos, self.trained, self.device = student, loss, videos, trained, device
        for value in trained:
            value.grad = torch.zeros_like(value)
        self.pool = None if device == "cpu" else torch.cuda.graph_pool_handle()
        self.work: dict[tuple, Repeated] = {}

    def __call__(self, chosen: int) -> dict[str, Tensor]:
        """The losses of step number `chosen`."""
        self.videos.begin()
        key = (chosen, *self.videos.cache.slots)
        if key not in self.work:
            self.work[key] = Repeated(partial(self._learn, chosen), self.device, warm=1, pool=self.pool)
        losses = self.work[key]()
        self.videos.finish(self.videos.latest.clone())
        return losses

    def _learn(self, chosen: int) -> dict[str, Tensor]:
        videos, student, losses = self.videos, self.student, {}
        torch._foreach_zero_([value.grad for value in self.trained])

        def flow(step: int, x: Tensor) -> Tensor:
            sigma = SIGMAS[step]
            if step != chosen:
                return videos.flow(x, sigma)
            with torch.enable_grad():
                with torch.autocast(self.device, torch.bfloat16, enabled=self.device != "cpu", cache_enabled=False):
                    made = videos.flow(x, sigma, student, Tape(videos.cache), student.encode_text(videos.embeds))
                losses.update(self.loss(videos, x, sigma, x - sigma * made.float()))
            return made.float().detach()

        with torch.no_grad():
            videos.remember(videos.denoise(flow))
        sum(losses.values()).backward()
        return {name: loss.detach() for name, loss in losses.items()}


def train(folder: Path, ranks: Ranks, stage: str, *, steps: int, device: str, seed: int = 0, batch: int = 64) -> None:
    """Trains as STAGES says; writes STAGE.pt."""
    torch.manual_seed(seed)
    how = STAGES[stage]
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    teachers = stage2.latest(folder, stage2.TEACHERS)
    teacher_model, text, words = stage2.load(folder, device, teachers)
    start = {"distilled": teachers, "matched": "distilled.pt", "streaming": stage2.latest(folder)}[stage]
    student = stage2.load(folder, device, start)[0]
    fast = copy.deepcopy(student).to(dtype).requires_grad_(False)
    trained = add_lora(student, RANK) if how.lora else student
    if how.lora and (folder / LORA_BEFORE).exists():
        load_lora(trained, folder / LORA_BEFORE, device)
    average = Average(trained, how.decay).to(device)
    weights = list(trained.parameters())
    optimiser = torch.optim.AdamW(weights, lr=how.rate, betas=how.betas, weight_decay=0.0, fused=device != "cpu")
    kept = {"trained": trained, "average": average, "optimiser": optimiser}
    critic_weights = []
    if how.critic:
        known = copy.deepcopy(teacher_model).requires_grad_(True)
        if (folder / CRITIC).exists():
            known = stage2.load(folder, device, CRITIC)[0]
        critic, critic_weights = Critic(copy.deepcopy(known), known, batch, dtype), list(known.parameters())
        learner = torch.optim.AdamW(critic_weights, lr=how.critic, betas=how.betas, weight_decay=0.0,
                                    fused=device != "cpu")
        kept |= {"critic": known, "learner": learner}
    progress = Progress(folder, stage, steps, kept, quiet=not ranks.first)
    same = random.Random(seed)  # what takes longer or shorter is the same on all GPUs
    seed += 1000003 * ranks.rank
    torch.manual_seed(seed)
    teacher = Teacher(teacher_model, embed(text, words.ids([""]).to(device)), batch, dtype)
    loss = Matching(teacher, critic) if how.critic else Following(teacher)
    if how.witness:
        loss = Witnessed(loss, folder, how.witness, batch, device)
    sources = [attrgetter(name) for name, _ in fast.named_parameters()]
    rng, prompts = random.Random(seed), torch.Generator().manual_seed(seed)
    videos = lesson = scenes = next_switch = None
    rhythms = itertools.cycle(how.switch_every)

    def told(scenes: Tensor) -> Tensor:
        return embed(text, words.of(scenes, rng).to(device))

    for step in progress:
        with torch.no_grad():
            torch._foreach_copy_(list(fast.parameters()), [source(student) for source in sources])
            if how.critic:
                critic.refresh()
            if videos is None or videos.block >= how.blocks:
                scenes = sample(batch, 1, prompts)[:, 0]
                if videos is None:
                    videos = Videos(fast, told(scenes))
                    lesson = Lesson(student, loss, videos, weights + critic_weights, device)
                else:
                    videos.restart(told(scenes))
                rhythm = next(rhythms, None)
                next_switch = same.randint(*rhythm) if rhythm else None
            elif videos.block == next_switch:
                scenes = successors(scenes, prompts)
                videos.switch(told(scenes))
                next_switch += same.randint(*rhythm)
            elif how.lora and videos.block > WINDOW and same.random() < JUMPS:
                videos.jump(BLOCK * same.randrange(max(1, (FARTHEST - videos.ahead) // BLOCK)))
        if how.witness:
            loss.tell(scenes)
        chosen = same.randrange(len(SIGMAS))
        losses = lesson(chosen)
        ranks.average_gradients(weights + critic_weights)
        if how.critic:
            improve(learner, critic_weights, cosine(step, steps, how.critic, warm=10))
        if step >= how.critic_first:
            improve(optimiser, weights, cosine(step, steps, how.rate, warm=min(50, steps // 10 + 1)))
        average.update(trained, step)
        progress.log(**losses, **{f"step{chosen + 1}": losses["loss"] * len(SIGMAS)})
    average.copy_to(trained)
    if not ranks.first:
        pass
    elif how.lora:
        torch.save({"lora": {name.replace("/", "."): {"A": low.A.detach(), "B": low.B.detach()}
                             for name, low in trained.items()}}, folder / f"{stage}.pt")
    else:
        stage2.save(folder / f"{stage}.pt", student, text)
    if ranks.first and how.critic:
        stage2.save(folder / CRITIC, known, text)
    ranks.wait()


def improve(optimiser: torch.optim.Optimizer, weights: list[Tensor], rate: float) -> None:
    """A step down the gradients, which are no longer than 1 together."""
    set_rate(optimiser, rate)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimiser.step()


def successors(scenes: Tensor, generator: torch.Generator) -> Tensor:
    """Scenes [B, 6] that differ from these in one to three attributes."""
    return sample(len(scenes), 2, generator, first=scenes)[:, 1]


def load_lora(added: nn.ModuleDict, file: Path, device: str) -> None:
    """Fills a LoRA with the values in a file of stage 7."""
    for name, parts in torch.load(file, map_location=device, weights_only=True)["lora"].items():
        added[name.replace(".", "/")].load_state_dict(parts)


def load_student(folder: Path, stage: str, device: str) -> tuple[CausalWan, nn.Module, Captions]:
    """The generator that a stage made, with its LoRA where it has one; text encoder and captions."""
    if stage != "streaming":
        return stage2.load(folder, device, f"{stage}.pt")
    student, text, words = stage2.load(folder, device, stage2.latest(folder))
    added = add_lora(student, RANK)
    load_lora(added, folder / f"{stage}.pt", device)
    for name in added:
        parametrize.remove_parametrizations(student.get_submodule(name.replace("/", ".")), "weight")
    return student, text, words
