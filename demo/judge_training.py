"""How the judge is trained: on drawn clips, made worse in the ways that a codec, a VAE and inexact latents make them
worse."""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.canvas import HEIGHT, WIDTH
from demo.judge import ATTRIBUTES, COUNT, OF_SUBJECT, SHORTEST, STRIDE, WINDOW, Judge, Network
from demo.training import vae as vaes
from demo.training.clips import BLOCK, random_manner
from demo.training.muon import Muon
from demo.training.progress import cosine, set_rate
from demo.world import CATEGORIES, HELD_OUT, STYLE, Manner, Script, draw, frames_of, paint, sample

SHARE_OTHER_COUNT = 0.12  # of clips with no subject, and the same of clips with two
PART = 64  # clips drawn at a time
DECODED = 3  # every third part of the stored clips went through the VAE
MARGIN = 5  # frames of these before the window: the first latent of a video is one frame, which is not like the others
SHARE_WHOLE = 0.65  # of steps whose clips are whole windows; the others show appearance alone


def random_script(clips: int, generator: torch.Generator, other_count: float = SHARE_OTHER_COUNT) -> Script:
    """Clips of one scene each, from all combinations: also those that the video model never sees."""
    held_out = max(1, round(clips / HELD_OUT))
    scenes = torch.cat([sample(clips - held_out, 1, generator), sample(held_out, 1, generator, held_out=True)])
    scenes = scenes[torch.randperm(clips, generator=generator)]
    chance = torch.rand(clips, generator=generator)
    copies = 1 - (chance < other_count).long() + (chance > 1 - other_count).long()
    return Script(scenes, torch.zeros(clips, 1), torch.rand(clips, STYLE, generator=generator), copies)


def labels(script: Script) -> dict[str, Tensor]:
    """What clips of one scene show, each attribute's index [B]."""
    return {name: script.scenes[:, 0, i] for i, name in enumerate(CATEGORIES)} | {COUNT: script.copies}


def draw_seen(script: Script, frames: int = WINDOW, manner: Manner | None = None) -> Tensor:
    """Those of the clips' frames that the judge looks at, [B, frames / STRIDE, 3, H, W] in 0 … 1; as `world.draw`
    without the frames between."""
    every = frames_of(script, frames, manner)
    seen = torch.arange(len(script) * frames, device=script.scenes.device).view(-1, frames)[:, ::STRIDE]
    return paint(every[seen.flatten()]).clamp(0, 1).unflatten(0, seen.shape)


class Decoder:
    """Drawn clips as a video's decoder shows them: through a VAE, with latents that are off in the ways in which
    generated ones are. A judge who had only seen clean ones took the streaks of a subject that bounces for spinning,
    and scenery that passed, but shimmered, for standing still.

    vae: the folder of a checkpoint's VAE.
    """

    def __init__(self, vae: Path, device: str):
        self.parts = vaes.load_exported(vae, device)

    @torch.inference_mode()
    def __call__(self, script: Script, manner: Manner | None, generator: torch.Generator) -> Tensor:
        """Whole windows, uint8 [B, WINDOW, 3, H, W]. generator: on the script's device."""
        vae, mean, std = self.parts
        latents = vaes.latents_of(vae, mean, std, draw(script, MARGIN + WINDOW, manner=manner))
        latents = (disturb(latents, generator) * std + mean).transpose(1, 2)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
            pixels = vaes.decode(vae, latents)[:, :, MARGIN:].float()
        return pixels.clamp(-1, 1).mul(127.5).add(127.5).round().to(torch.uint8).transpose(1, 2)


def disturb(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents [B, F, 16, h, w] of whole blocks, blurred a little in time and space, with noise, and with coarse noise
    that stays for a block; every clip in its own way. generator: on their device."""
    batch, length, channels, rows, columns = latents.shape

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(batch, 1, 1, 1, 1, device=latents.device, generator=generator)
        return (values * (high - low) + low).clamp(min=0)

    padded = torch.cat([latents[:, :1], latents, latents[:, -1:]], 1)
    x = torch.lerp(latents, (padded[:, :-2] + latents + padded[:, 2:]) / 3, uniform(-0.4, 0.4))
    soft = F.avg_pool2d(x.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(x)
    x = torch.lerp(x, soft, uniform(-0.4, 0.4))
    x = x + uniform(-0.2, 0.4) * torch.randn(x.shape, device=x.device, generator=generator)
    coarse = (batch * length // BLOCK, channels, rows // 2, columns // 2)
    coarse = torch.randn(coarse, device=x.device, generator=generator)
    coarse = F.interpolate(coarse, size=(rows, columns), mode="bilinear", align_corners=False)
    return x + uniform(-0.3, 0.4) * coarse.unflatten(0, (batch, -1)).repeat_interleave(BLOCK, 1)


def worsen(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Clips [B, T, 3, H, W] in 0 … 1, each shifted a little, blurred, of other brightness, contrast, gamma and
    saturation, and noisy; every clip in its own way, the same over all its frames. generator: on the clips' device."""
    batch, length = clips.shape[:2]

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(batch, device=clips.device, generator=generator) * (high - low) + low
        return values.repeat_interleave(length)[:, None, None, None]

    def noise(rows: int, columns: int) -> Tensor:
        return torch.randn(batch * length, 3, rows, columns, device=clips.device, generator=generator)

    x = clips.flatten(0, 1)
    scale, right, down = uniform(0.96, 1.04), uniform(-5, 5) * 2 / WIDTH, uniform(-4, 4) * 2 / HEIGHT
    zero = torch.zeros_like(scale)
    theta = torch.cat([torch.cat([scale, zero, right], 3), torch.cat([zero, scale, down], 3)], 2)[:, 0]
    where = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, where, padding_mode="border", align_corners=False)
    soft = F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=False)
    x = torch.lerp(x, soft, uniform(-0.4, 1.0).clamp(min=0))
    x = x.clamp(1e-4, 1) ** torch.exp(uniform(-0.18, 0.18))
    x = (x - 0.5) * uniform(0.85, 1.15) + 0.5 + uniform(-0.06, 0.06)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.8, 1.15)
    x = x + noise(HEIGHT, WIDTH) * uniform(-0.02, 0.04).clamp(min=0)
    coarse = F.interpolate(noise(HEIGHT // 8, WIDTH // 8), size=x.shape[2:], mode="bilinear", align_corners=False)
    x = x + coarse * uniform(-0.02, 0.03).clamp(min=0)
    return x.clamp(0, 1).unflatten(0, (batch, length))


def loss_of(logits: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, the sum over attributes. Clips that are not whole windows say nothing of motion and camera, and
    clips without a subject nothing of what it is."""
    total = 0
    there = (truth[COUNT] > 0).float()
    for name in ATTRIBUTES:
        if name in logits:
            each = F.cross_entropy(logits[name].float(), truth[name], reduction="none")
            weight = there if name in OF_SUBJECT else torch.ones_like(there)
            total = total + (each * weight).sum() / weight.sum().clamp(min=1)
    return total


@torch.inference_mode()
def accuracy(network: Network, clips: Tensor, truth: dict[str, Tensor], batch: int) -> dict[str, float]:
    """Share of clips, uint8 [B, T, 3, H, W], of which each attribute is read right; those without a subject count only
    for what they have."""
    network.eval()
    parts = [network(part.float() / 255) for part in clips.split(batch)]
    network.train()
    there = truth[COUNT] > 0
    result = {}
    for name in ATTRIBUTES:
        right = torch.cat([part[name] for part in parts]).argmax(-1) == truth[name]
        result[name] = (right[there] if name in OF_SUBJECT else right).float().mean().item()
    return result


def train(args: argparse.Namespace) -> None:
    """Trains; a run that was stopped goes on from its checkpoint. A step's clips depend on seed, step and VAE alone."""
    torch.manual_seed(args.seed)
    network = (Judge.load(args.start).network.train().requires_grad_(True) if args.start else Network()).to(args.device)
    filters = [p for p in network.parameters() if p.dim() > 3]
    rest = [p for p in network.parameters() if p.dim() <= 3]
    optimizers = [Muon(filters, args.lr), torch.optim.AdamW(rest, args.lr, weight_decay=0.02)]
    checkpoint = args.out.with_suffix(".train.pt")
    step = _resume(checkpoint, args, network, optimizers)

    test = random_script(args.test_clips, torch.Generator().manual_seed(args.seed + 10**6)).to(args.device)
    test_truth = labels(test)
    test_clips = torch.cat([(255 * draw_seen(test[i:i + args.batch])).round().to(torch.uint8)
                            for i in range(0, len(test), args.batch)])
    store = Store(args.clips, args.device, args.seed, Decoder(args.vae, args.device))
    count = sum(p.numel() for p in network.parameters())
    print(f"judge: {count / 1e6:.2f} M parameters, step {step} of {args.steps}, batch {args.batch}", flush=True)

    begun = reported = saved = time.monotonic()
    first, sums = step, []
    while step < args.steps:
        clips, truth, whole = store.batch(args.batch, args.seed * 10**7 + step)
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda")):
            loss = loss_of(network(clips), truth)
        network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        for optimizer in optimizers:
            set_rate(optimizer, cosine(step, args.steps, args.lr, warm=args.steps // 10 + 1))
            optimizer.step()
        step += 1
        if whole:
            sums.append(loss.detach())
        now = time.monotonic()
        if now - reported > args.seconds_between_reports or step == args.steps:
            right = accuracy(network, test_clips, test_truth, args.batch)
            table = " ".join(f"{name} {100 * value:.1f}" for name, value in right.items())
            mean = torch.stack(sums).mean().item() if sums else float("nan")
            print(f"step {step} loss {mean:.3f} | {table} | {(now - begun) / (step - first):.3f} s a step", flush=True)
            reported, sums = time.monotonic(), []
        if now - saved > args.seconds_between_saves and step < args.steps:
            _save(checkpoint, args, network, optimizers, step)
            saved = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Judge(network).save(args.out)
    checkpoint.unlink(missing_ok=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB", flush=True)


class Store:
    """Drawn windows, some of them decoded, uint8 [N, WINDOW / STRIDE, 3, H, W] on the device, and their labels."""

    def __init__(self, clips: int, device: str, seed: int, decoder: Decoder, batch: int = 256):
        begun = time.monotonic()
        scripts = [random_script(min(batch, clips - i), torch.Generator().manual_seed(seed * 10**7 + i)).to(device)
                   for i in range(0, clips, batch)]
        self.clips = torch.empty(clips, WINDOW // STRIDE, 3, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
        filled = 0  # in place: all of them twice would not fit some GPUs
        parts = [script[i:i + PART] for script in scripts for i in range(0, len(script), PART)]
        on_device = torch.Generator(device).manual_seed(seed)
        for number, part in enumerate(parts):
            manner = random_manner(len(part), torch.Generator().manual_seed(seed * 10**7 + filled), device)
            if number % DECODED:
                seen = (255 * draw_seen(part, manner=manner)).round().to(torch.uint8)
            else:
                seen = decoder(part, manner, on_device)[:, ::STRIDE]
            self.clips[filled:filled + len(part)] = seen
            filled += len(part)
        every = [labels(script) for script in scripts]
        self.truth = {name: torch.cat([truth[name] for truth in every]) for name in ATTRIBUTES}
        print(f"judge: {clips} clips drawn in {time.monotonic() - begun:.0f} s", flush=True)

    def batch(self, size: int, seed: int) -> tuple[Tensor, dict[str, Tensor], bool]:
        """Worsened clips, some of them mirrored, what they show, and whether they are whole windows."""
        generator = torch.Generator().manual_seed(seed)
        device = self.clips.device
        index = torch.randint(len(self.clips), (size,), generator=generator).to(device)
        mirrored = (torch.rand(size, generator=generator) < 0.5).to(device)
        clips, truth = self.clips[index].float() / 255, {name: value[index] for name, value in self.truth.items()}
        clips = torch.where(mirrored[:, None, None, None, None], clips.flip(-1), clips)
        left_or_right = truth["motion"] < 2  # which a mirror swaps
        truth["motion"] = torch.where(mirrored & left_or_right, 1 - truth["motion"], truth["motion"])
        whole = torch.rand((), generator=generator).item() < SHARE_WHOLE
        if not whole:
            length = int(torch.randint(SHORTEST // STRIDE, WINDOW // STRIDE, (), generator=generator))
            first = int(torch.randint(0, clips.shape[1] - length + 1, (), generator=generator))
            clips = clips[:, first:first + length]
        return worsen(clips, torch.Generator(device).manual_seed(seed)), truth, whole


def _save(path: Path, args: argparse.Namespace, network, optimizers, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save({"step": step, "of": _settings(args), "network": network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, part)
    part.replace(path)


def _settings(args: argparse.Namespace) -> list:
    return [args.steps, args.batch, args.seed, args.lr, str(args.vae)]


def _resume(path: Path, args: argparse.Namespace, network, optimizers) -> int:
    """Loads the checkpoint of a run with the same settings, where there is one. Returns the step it got to."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=args.device, weights_only=True)
    if state["of"] != _settings(args):
        print(f"{path} is of another run (steps, batch, seed, lr, VAE: {state['of']}); begins anew", flush=True)
        return 0
    network.load_state_dict(state["network"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return state["step"]
