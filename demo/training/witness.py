"""A witness: a small network that sees in the latents of the latest blocks what their scene is, also how the subject
moves and the camera. It learns from drawn clips alone. While the LoRA is trained, the witness is to see in its videos
what their prompts say; the judge, which measures, reads pixels and has no part in training the generator.

A teacher who is shown a past in which a pan has become small goes on with a small pan. A witness is told how large pans
are: of a clip whose camera moves by a share of what it should, it learns that much camera and the rest standing still.
"""

import time
from dataclasses import fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.training import vae as vaes
from demo.training.clips import BLOCK, random_manner, random_script, switch_block
from demo.training.progress import Average, Progress, Repeated, cosine, set_rate
from demo.training.teacher import noisy
from demo.world import CATEGORIES, CHOICES, HEIGHT, WIDTH, Manner, draw
from utils.errors import UserError
from wan.geometry import PIXELS

BLOCKS = 3  # that it sees at a time: what a generator's window holds beside the sink
CLIP = 7  # blocks of a drawn clip
NOISE = 0.5  # most σ on what it sees; so it goes by what a video shows, not by traces of how it was made
EXACT = 0.5  # share of the clips that keep to the world's own manner
CAMERA = CATEGORIES.index("camera")
STILL = CHOICES["camera"].index("still")
FILE = "witness.pt"


class Witness(nn.Module):
    """Convolutions over space and time, then a layer that knows where and when; one linear layer for each attribute."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.layers = nn.Sequential(
            _layer(16, width, stride=1), _layer(width, width, stride=2), _layer(width, width, stride=1),
            _layer(width, width, stride=2), nn.Conv3d(width, 48, 1), nn.Flatten())
        rows, columns = (-(-size // PIXELS // 4) for size in (HEIGHT, WIDTH))
        self.course = nn.Sequential(nn.Linear(48 * BLOCKS * BLOCK * rows * columns, 256), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(256, len(CHOICES[name])) for name in CATEGORIES)

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Latents [B, BLOCKS·BLOCK, 16, h, w] → logits of each attribute [B, choices]."""
        seen = self.course(self.layers(latents.transpose(1, 2)))
        return [head(seen) for head in self.heads]

    def loss(self, latents: Tensor, scenes: Tensor, moved: Tensor | None = None) -> dict[str, Tensor]:
        """Cross-entropy of each attribute, from latents as in `forward`, under noise. scenes [BLOCKS, B, 6]: what each
        block is to show; what changes among them is left out. moved [B]: how far the camera moves; None: all the
        way."""
        sigma = NOISE * torch.rand(len(latents), device=latents.device)
        logits = self(noisy(latents, torch.randn_like(latents), sigma))
        lasting = (scenes == scenes[-1]).all(0).float()
        losses = {}
        for i, (name, seen) in enumerate(zip(CATEGORIES, logits, strict=True)):
            truth = F.one_hot(scenes[-1, :, i], len(CHOICES[name])).float()
            if i == CAMERA and moved is not None:
                still = F.one_hot(torch.full_like(scenes[-1, :, i], STILL), len(CHOICES[name])).float()
                truth = torch.lerp(still, truth, moved[:, None])
            error = -(truth * F.log_softmax(seen.float(), -1)).sum(-1)
            losses[name] = (error * lasting[:, i]).sum() / lasting[:, i].sum().clamp(min=1)
        return losses


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 3, (1, stride, stride), 1), nn.GroupNorm(8, outputs), nn.SiLU())


class Store:
    """Latents of drawn clips [N, F, 16, h, w], their scenes [N, 2, 6], the block at which the second begins [N] (0: it
    does not), and how far the camera moves [N]."""

    def __init__(self, folder: Path, clips: int, device: str, seed: int, held_out: bool = False):
        vae, mean, std = vaes.load(folder, device)
        frames, batch, latents, moved, scripts = 4 * BLOCK * CLIP - 3, min(clips, 64), [], [], []
        for first in range(0, clips, batch):
            generator = torch.Generator().manual_seed(seed + 49979687 + first)
            script = random_script(min(batch, clips - first), frames, generator, held_out)
            own, other = Manner.exact(len(script), device), random_manner(len(script), generator, device)
            exact, camera = (torch.rand(len(script), generator=generator).to(device) for _ in range(2))
            other = replace(other, camera=camera, fine=own.fine)
            manner = Manner(*(torch.where(exact < EXACT, getattr(own, field.name), getattr(other, field.name))
                              for field in fields(Manner)))
            pixels = draw(script.to(device), frames, batch=2048, manner=manner)
            latents.append(vaes.latents_of(vae, mean, std, pixels).bfloat16())
            moved.append(manner.camera)
            scripts.append(script)
        self.latents, self.moved = torch.cat(latents), torch.cat(moved)
        self.scenes, self.switch = (torch.cat(parts).to(device) for parts in zip(
            *((script.scenes, switch_block(script)) for script in scripts), strict=True))

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Stretches of random clips, as `Witness.loss` takes them."""
        device = self.latents.device
        clip = torch.randint(len(self.latents), (size,), device=device)
        blocks = torch.arange(BLOCKS, device=device)[:, None] + torch.randint(CLIP - BLOCKS + 1, (size,), device=device)
        second = (self.switch[clip] > 0) & (blocks >= self.switch[clip])
        latents = self.latents.unflatten(1, (CLIP, BLOCK))[clip, blocks].transpose(0, 1).flatten(1, 2)
        return latents.float(), self.scenes[clip, second.long()], self.moved[clip]


def train(folder: Path, *, steps: int, device: str, seed: int = 0, clips: int = 8192, batch: int = 256,
          rate: float = 1e-3) -> None:
    """Writes `witness.pt`, the running mean of the weights; needs `vae.pt`."""
    torch.manual_seed(seed)
    witness = Witness().to(device)
    average = Average(witness, 0.995).to(device)
    cuda = device != "cpu"
    optimiser = torch.optim.AdamW(witness.parameters(), lr=torch.tensor(rate, device=device), weight_decay=0.02,
                                  capturable=cuda, fused=cuda)
    start = time.perf_counter()
    store = Store(folder, clips, device, seed)
    print(f"witness: {clips} clips in {time.perf_counter() - start:.0f} s", flush=True)
    progress = Progress(folder, "witness", steps, {"witness": witness, "average": average, "optimiser": optimiser})

    def learn() -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            losses = witness.loss(*store.batch(batch))
        witness.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(witness.parameters(), 1.0)
        optimiser.step()
        return {name: value.detach() for name, value in losses.items()}

    step_of = Repeated(learn, device)
    for step in progress:
        set_rate(optimiser, cosine(step, steps, rate, warm=min(200, steps // 10 + 1)))
        losses = step_of()
        average.update(witness, step)
        progress.log(**losses)
    average.copy_to(witness)
    torch.save(witness.state_dict(), folder / FILE)
    right = accuracy(witness, Store(folder, max(1, clips // 16), device, seed + 1, held_out=True))
    print("witness: right on other clips, of held-out scenes: "
          + "  ".join(f"{name} {share:.3f}" for name, share in right.items()), flush=True)


def find_witness(folder: Path) -> Path:
    """The file with a witness. Raises UserError where there is none."""
    if not (folder / FILE).exists():
        raise UserError(f"{folder / FILE}: no such file; train the witness first, --stages witness streaming")
    return folder / FILE


@torch.no_grad()
def accuracy(witness: Witness, store: Store, draws: int = 8) -> dict[str, float]:
    """Share of what lasts through a stretch that is seen right; of cameras, where they move all the way."""
    right, count = torch.zeros(2, len(CATEGORIES), device=store.latents.device)
    for _ in range(draws):
        latents, scenes, moved = store.batch(len(store.latents))
        lasting = (scenes == scenes[-1]).all(0)
        lasting[:, CAMERA] &= moved == 1
        seen = torch.stack([logits.argmax(-1) for logits in witness(latents)], 1)
        right += ((seen == scenes[-1]) & lasting).sum(0)
        count += lasting.sum(0)
    return dict(zip(CATEGORIES, (right / count.clamp(min=1)).tolist(), strict=True))


class Witnessed:
    """A loss, and that a witness sees in the latest blocks what the prompts say.

    loss: as `Matching`. weight: of the witness's cross-entropy beside it; `witness` among the losses is so weighted.
    The first two blocks of a video have none.
    """

    def __init__(self, loss, folder: Path, weight: float, batch: int, device: str):
        self.loss, self.weight = loss, weight
        self.witness = Witness().to(device).requires_grad_(False)
        self.witness.load_state_dict(torch.load(find_witness(folder), map_location=device, weights_only=True))
        self.scenes = torch.zeros(BLOCKS, batch, len(CATEGORIES), dtype=torch.int64, device=device)

    def tell(self, scenes: Tensor) -> None:
        """What the next block is to show [B, 6]."""
        self.scenes.copy_(torch.cat([self.scenes[1:], scenes[None].to(self.scenes.device)]))

    def __call__(self, videos, x: Tensor, sigma: float, x0: Tensor) -> dict[str, Tensor]:
        losses = self.loss(videos, x, sigma, x0)
        past = videos.past()[1 - BLOCKS:]
        if len(past) == BLOCKS - 1:
            seen = self.witness.loss(torch.cat([*past, x0], 1), self.scenes)
            losses["witness"] = self.weight * sum(seen.values())
        return losses
