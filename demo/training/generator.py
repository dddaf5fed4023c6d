"""Stages 2 and 3: the text encoder and the causal generator, by flow matching with teacher forcing.

What a caption says of a scene shows in the first block; every later one can take it from its past. So the text encoder
learns to read first, then the two see a great many first blocks, then clips of five seconds. Stage 3 does it
again, from where stage 2 got to, on clips that it has not seen.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from demo.captions import corpus
from demo.random_checkpoint import tokenizer
from demo.random_weights import SIZES
from demo.training import reading
from demo.training import vae as vaes
from demo.training.causal import Parallel, Plan
from demo.training.clips import BLOCK, Captions, random_script, switch_block
from demo.training.muon import Muon
from demo.training.progress import Average, Progress, Repeated, cosine, set_rate
from demo.training.ranks import Ranks
from demo.training.reading import read
from demo.world import HEIGHT, WIDTH, draw, scenery_speed, subject_cover
from pipeline.sampler import shifted_sigma
from wan.geometry import PIXELS
from wan.model import CausalWan
from wan.rope import RotaryEmbedding

GENERATOR = SIZES["toy"].generator
TEXT = {**SIZES["toy"].text, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
TOKENS = GENERATOR.text_len  # of a caption, at most
WINDOW, SINK = 4, 1  # blocks
SHIFT = 5.0
CAPTIONS_EACH = 4  # of every scene
SUBJECT = 12.0  # how much more the loss counts where the subject is: it is a small part of the picture
SCENERY = 4.0  # and in frames in which the scenery goes by: only where it is drawn sharply does it show that it moves
UNTOLD = 0.1  # share of the clips without a caption, for classifier-free guidance
BLURRED, MOST_BLUR = 0.5, 0.6  # share of the clips whose past is noisy, and the most noise (σ) in it


@dataclass(frozen=True)
class Phase:
    """A part of the training. share: of the steps. blocks: of a clip. draws: noisy versions of each block of a clip."""

    share: float
    blocks: int
    batch: int
    draws: int


PHASES = {"generator": (Phase(0.43, 1, 512, 1), Phase(0.57, 7, 48, 2)),
          "refined": (Phase(0.5, 1, 512, 1), Phase(0.5, 7, 48, 2))}
RATES = {"generator": 2e-3, "refined": 1.2e-3}
TEACHERS = ("refined.pt", "generator.pt")  # files with a generator, the latest first
RESULTS = ("matched.pt", "distilled.pt", *TEACHERS)
FIRST_BLOCKS = 3  # so many times more clips of one block than of all
READING = 0.1  # steps of it for each step of the generator's


def new_models(device: str) -> tuple[CausalWan, UMT5EncoderModel]:
    """Generator and text encoder before training: no flow yet, but what the prompt says goes in from the start."""
    model = CausalWan(GENERATOR)
    for name, value in model.named_parameters():
        if name.startswith("head.head") or name.endswith("cross_attn.o.bias"):
            nn.init.zeros_(value)
        elif name.endswith("cross_attn.o.weight"):
            nn.init.normal_(value, std=value.shape[1] ** -0.5)
        elif name.startswith(("time_projection", "text_embedding", "time_embedding")) and value.dim() > 1:
            nn.init.normal_(value, std=0.02)
    return model.to(device), UMT5EncoderModel(UMT5Config(**TEXT)).to(device)


def new_rope(device: str) -> RotaryEmbedding:
    _, ph, pw = GENERATOR.patch_size
    return RotaryEmbedding(GENERATOR.head_dim, HEIGHT // PIXELS // ph, WIDTH // PIXELS // pw, device)


class Store:
    """Clips as latents [N, F, 16, h, w], with the loss's weights beyond 1 [N, F, h, w], their switch's block [N] and
    their captions' tokens [N, 2, CAPTIONS_EACH, n]. In half of the clips the scene changes, where there is room."""

    def __init__(self, folder: Path, clips: int, blocks: int, words, device: str, seed: int):
        vae, mean, std = vaes.load(folder, device)
        start = time.perf_counter()
        frames, batch = 4 * BLOCK * blocks - 3, max(1, 448 // blocks)
        scripts = [random_script(min(batch, clips - i), frames, torch.Generator().manual_seed(seed + 15485863 + i),
                                 switch=0.5 if blocks > 1 else 0.0) for i in range(0, clips, batch)]
        latents, weights = [], []
        for script in scripts:
            cover, speed = subject_cover(script.to(device), frames, PIXELS), scenery_speed(script.to(device), frames)
            cover, speed = (torch.cat([x[:, :1], x[:, 1:].unflatten(1, (-1, 4)).amax(2)], 1) for x in (cover, speed))
            weights.append((SUBJECT * cover + SCENERY * speed[..., None, None]).half())  # a latent is 4 frames
            pixels = draw(script.to(device), frames, batch=2048)
            latents.append(vaes.latents_of(vae, mean, std, pixels).bfloat16())
        self.latents, self.weights = torch.cat(latents), torch.cat(weights)
        self.switch = torch.cat([switch_block(script) for script in scripts]).to(device)
        rng = random.Random(seed)
        scenes = torch.cat([script.scenes for script in scripts])
        ids = torch.stack([words.of(scenes.flatten(0, 1), rng) for _ in range(CAPTIONS_EACH)], 1)
        self.ids = ids.view(clips, 2, CAPTIONS_EACH, -1).to(device)
        print(f"store: {clips} clips of {frames} frames in {time.perf_counter() - start:.0f} s", flush=True)

    def batch(self, size: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first blocks of random clips: latents [B, F, 16, h, w] float32, token ids [B, n], and the loss's weights
        [B, F, h, w], which are 0 for the blocks that the caption is not about.

        Of a clip with a switch the caption is the first scene's or, more often, the second's; under the second the
        blocks before the switch are the past that a re-cache shows to the new prompt.
        """
        device, latents = self.latents.device, blocks * BLOCK
        index = torch.randint(len(self.latents), (size,), device=device)
        switch = self.switch[index]
        switches = (switch > 0) & (switch < blocks)
        second = (torch.rand(size, device=device) < 0.7) & switches
        ids = self.ids[index, second.long(), torch.randint(CAPTIONS_EACH, (size,), device=device)]
        block = torch.arange(blocks, device=device)
        until = torch.where(switches, switch, blocks)
        told = torch.where(second[:, None], block >= switch[:, None], block < until[:, None])
        weights = 1 + self.weights[index, :latents].float()
        return (self.latents[index, :latents].float(), ids,
                weights * told.repeat_interleave(BLOCK, 1)[..., None, None])


def random_sigma(shape: tuple[int, ...], device) -> Tensor:
    """σ of the shifted schedule, uniform before the shift."""
    return shifted_sigma(torch.rand(shape, device=device), SHIFT)


def optimisers(model: CausalWan, text: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *text.parameters()) if id(p) not in ids]
    device, cuda = rest[0].device, rest[0].is_cuda
    return [Muon(matrices, lr=torch.tensor(0.0, device=device)),
            torch.optim.AdamW(rest, lr=torch.tensor(0.0, device=device), betas=(0.9, 0.98), weight_decay=0.0,
                              capturable=cuda, fused=cuda)]


def phase_of(phases: tuple[Phase, ...], step: int, steps: int) -> Phase:
    """The phase that a step belongs to."""
    done = 0.0
    for phase in phases:
        done += phase.share
        if step < done * steps:
            return phase
    return phases[-1]


def train(folder: Path, ranks: Ranks, stage: str, *, steps: int, device: str, seed: int = 0,
          clips: int = 8192) -> None:
    """Writes STAGE.pt: the running mean of the weights of generator and text encoder. stage: "generator", or "refined",
    which starts from its result. clips: long ones, on all GPUs together."""
    torch.manual_seed(seed)
    clips, phases = max(1, clips // ranks.size), PHASES[stage]
    if stage == "generator":
        words = Captions(tokenizer(TEXT["vocab_size"], corpus()), TOKENS)
        model, text = new_models(device)
    else:
        model, text, words = load(folder, device, "generator.pt")
        text.train().requires_grad_(True)
        seed += 179424673
    if ranks.first and stage == "generator":
        reading.train(folder, text, words, steps=max(1, round(READING * steps)), device=device, seed=seed,
                      captions=4 * clips)
    ranks.share(text)
    both = nn.ModuleList([model, text])
    average = Average(both, 0.9985).to(device)
    matrices, rest = optimisers(model, text)
    progress = Progress(folder, stage, steps, {"both": both, "average": average, "matrices": matrices,
                                                     "rest": rest}, quiet=not ranks.first)
    seed += 1000003 * ranks.rank
    torch.manual_seed(seed)
    nothing = words.ids([""]).to(device)
    phase = store = forward = None

    def learn() -> dict[str, Tensor]:
        latents, ids, weights = store.batch(phase.batch, phase.blocks)
        ids = torch.where(torch.rand(len(ids), 1, device=device) < UNTOLD, nothing, ids)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu", cache_enabled=False):
            loss = flow_loss(forward, latents, read(text, ids), weights, phase.draws)
        both.zero_grad(set_to_none=True)
        loss.backward()
        return {"flow": loss.detach()}

    def improve() -> dict[str, Tensor]:
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        matrices.step()
        rest.step()
        return {}

    for step in progress:
        if phase is not phase_of(phases, step, steps):
            before, phase = phase, phase_of(phases, step, steps)
            if before is None or before.blocks == 1:
                several = phase.blocks > 1
                store = gradients = None  # frees the last one's memory first
                store = Store(folder, clips if several else FIRST_BLOCKS * clips,
                              phases[-1].blocks if several else 1, words, device, seed)
            plan = Plan(phase.blocks, phase.draws, window=WINDOW, sink=SINK, rope=new_rope(device), frames=BLOCK)
            forward = Parallel(model, plan, compiled=device != "cpu")
            gradients, update = Repeated(learn, device), Repeated(improve, device)
        for optimiser in (matrices, rest):
            set_rate(optimiser, cosine(step, steps, RATES[stage], warm=min(300, steps // 10 + 1)))
        losses = gradients()
        ranks.average_gradients(list(both.parameters()))
        update()
        average.update(both, step)
        progress.log(**losses)
    average.copy_to(both)
    if ranks.first:
        save(folder / f"{stage}.pt", model, text)
    ranks.wait()


def flow_loss(forward: Parallel, latents: Tensor, embeds: Tensor, weights: Tensor, draws: int) -> Tensor:
    """Mean squared error of the flow v = noise − x0, by weights [B, F, h, w]."""
    batch, device = len(latents), latents.device
    blocks = latents.unflatten(1, (-1, BLOCK))  # [B, n, F, C, h, w]
    past = blocks[:, :-1]
    blur = MOST_BLUR * torch.rand(batch, 1, device=device) * (torch.rand(batch, 1, device=device) < BLURRED)
    wide = (..., None, None, None, None)
    past = (1 - blur[wide]) * past + blur[wide] * torch.randn_like(past)
    clean = blocks.repeat(1, draws, 1, 1, 1, 1)
    noise = torch.randn_like(clean)
    sigma = random_sigma(clean.shape[:2], device)
    noisy = (1 - sigma[wide]) * clean + sigma[wide] * noise
    t = 1000 * torch.cat([blur.expand(-1, past.shape[1]), sigma], 1)
    flow = forward(torch.cat([past, noisy], 1), t, embeds).float()
    error = (flow - (noise - clean)).square().mean(3)
    weights = weights.unflatten(1, (-1, BLOCK)).repeat(1, draws, 1, 1, 1)
    return (error * weights).sum() / weights.sum()


def save(file: Path, model: CausalWan, text: nn.Module) -> None:
    """Generator and text encoder, in half precision."""
    torch.save({part: {name: value.half() for name, value in module.state_dict().items()}
                for part, module in (("generator", model), ("text", text))}, file)


def latest(folder: Path, names: tuple[str, ...] = RESULTS) -> str:
    """The first of these files that is there."""
    return next((name for name in names if (folder / name).exists()), names[-1])


def load(folder: Path, device: str, name: str) -> tuple[CausalWan, UMT5EncoderModel, Captions]:
    """Generator, text encoder and captions of a file of RESULTS."""
    kept = torch.load(folder / name, map_location=device, weights_only=True)
    model, text = new_models(device)
    model.load_state_dict(kept["generator"])
    text.load_state_dict(kept["text"])
    return model, text.eval().requires_grad_(False), Captions(tokenizer(TEXT["vocab_size"], corpus()), TOKENS)
