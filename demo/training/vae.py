"""Stage 1: the VAE. AutoencoderKLWan, small, with latents whose mean and std are its own."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor

from demo.random_weights import SIZES as MODELS
from demo.training.clips import random_script
from demo.training.muon import Muon
from demo.training.progress import Average, Progress, Repeated, cosine, set_rate
from demo.world import HEIGHT, WIDTH, draw, subject_cover
from utils.checkpoint import folder_files

SIZES = MODELS["toy"].vae
FRAMES = 17  # of a stored clip: 5 latents
KL = 2e-4  # weight of the divergence, per latent number, from a unit Gaussian
SUBJECT = 4.0  # how much more the loss counts where the subject is: it is small, moves, and is what one looks at
SHAKE = 0.25  # noise on the latents that the decoder is trained with, in their stds: the generator is never exact


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of a video's latents: `AutoencoderKLWan.encode`, but all after the first frame at once.

    pixels [B, 3, T, H, W] in [-1, 1] → 2 × [B, 16, F, h, w].
    """
    cache = [None] * _causal_convolutions(vae.encoder)
    pixels = patchify(pixels, vae.config.patch_size or 1)
    first = vae.encoder(pixels[:, :, :1], feat_cache=cache, feat_idx=[0])
    rest = vae.encoder(pixels[:, :, 1:], feat_cache=cache, feat_idx=[0])
    return vae.quant_conv(torch.cat([first, rest], 2)).chunk(2, dim=1)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """A video from its latents: `AutoencoderKLWan.decode` without its clamp, all after the first latent at once."""
    cache = [None] * _causal_convolutions(vae.decoder)
    latents = vae.post_quant_conv(latents)
    first = vae.decoder(latents[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    rest = vae.decoder(latents[:, :, 1:], feat_cache=cache, feat_idx=[0])
    return unpatchify(torch.cat([first, rest], 2), vae.config.patch_size or 1)


def latents_of(vae: AutoencoderKLWan, mean: Tensor, std: Tensor, clips: Tensor) -> Tensor:
    """Drawn clips, uint8 [B, T, 3, H, W] → normalised latents [B, F, 16, h, w]. vae, mean, std: as from `load`."""
    pixels = clips.transpose(1, 2).float() / 127.5 - 1
    with torch.no_grad(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        return (encode(vae, pixels)[0].float().transpose(1, 2) - mean) / std


def _causal_convolutions(module: torch.nn.Module) -> int:
    return sum(type(part).__name__ == "WanCausalConv3d" for part in module.modules())


def loss(vae: AutoencoderKLWan, pixels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """How far a clip [B, 3, T, H, W] is from what becomes of it: of its pixels, of their differences to neighbours in
    space and time (which keep edges and motion), and of its latents from a Gaussian. weights [B, 1, T, H, W]: how much
    each pixel counts; 1 on average."""
    mean, log_variance = encode(vae, pixels)
    mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
    std = torch.exp(0.5 * log_variance)
    spread = mean.detach().std()
    latents = mean + std * torch.randn_like(mean) + SHAKE * spread * torch.randn_like(mean) * torch.rand_like(
        mean[:, :1, :1, :1, :1])
    made = decode(vae, latents).float()
    error = made - pixels
    edges = sum((error.diff(dim=axis).abs() * weights.narrow(axis, 1, weights.shape[axis] - 1)).mean()
                for axis in (2, 3, 4)) / 3
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {"pixels": (error.abs() * weights).mean(), "edges": edges, "divergence": divergence}


class Clips:
    """Drawn clips, uint8 [N, FRAMES, 3, H, W] on the device, and how much of each pixel is near the subject, uint8
    [N, FRAMES, H, W]."""

    def __init__(self, clips: int, device: str, seed: int, batch: int = 256):
        scripts = [random_script(min(batch, clips - i), FRAMES, torch.Generator().manual_seed(seed + 7919 * i),
                                 held_out=False).to(device) for i in range(0, clips, batch)]
        self.pixels = torch.cat([draw(script, FRAMES, batch=4096) for script in scripts])
        self.cover = torch.cat([(255 * subject_cover(script, FRAMES, 1)).to(torch.uint8) for script in scripts])

    def piece(self, pixels: Tensor, weights: Tensor) -> None:
        """Fills pixels [B, 3, T, h, w], in [-1, 1], and weights [B, 1, T, h, w] with random pieces of random clips."""
        clips, _, frames, height, width = pixels.shape
        y, x = (int(torch.randint(0, whole - part + 1, ())) for whole, part in ((HEIGHT, height), (WIDTH, width)))
        index = torch.randint(len(self.pixels), (clips,), device=pixels.device)
        piece = self.pixels[:, :frames, :, y:y + height, x:x + width][index]
        pixels.copy_(piece.transpose(1, 2)).div_(127.5).sub_(1)
        weights.copy_(self.cover[:, None, :frames, y:y + height, x:x + width][index]).mul_(SUBJECT / 255).add_(1)
        weights.div_(weights.mean())


def train(folder: Path, *, steps: int, device: str, seed: int = 0, clips: int = 8192, rate: float = 3e-3,
          crop: tuple[int, ...] = (32, 3, 9, 64, 64), whole: tuple[int, ...] = (4, 3, FRAMES, HEIGHT, WIDTH),
          measured: int = 64) -> None:
    """Trains on crops of drawn clips, the last third of the steps on whole frames; writes `vae.pt`.

    crop, whole: shapes [B, 3, T, H, W] of what a step sees. measured: clips for the latents' statistics.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**SIZES).to(device)
    average = Average(vae, 0.999).to(device)
    cuda = device != "cpu"
    filters = [p for p in vae.parameters() if p.dim() > 3 and p.shape[0] > 1 and p.numel() > p.shape[0]]
    rest = [p for p in vae.parameters() if all(p is not other for other in filters)]
    optimisers = {"filters": Muon(filters, lr=torch.tensor(rate, device=device)),
                  "rest": torch.optim.AdamW(rest, lr=torch.tensor(rate, device=device), betas=(0.9, 0.99),
                                            weight_decay=0.0, capturable=cuda, fused=cuda)}
    progress = Progress(folder, "vae", steps, {"vae": vae, "average": average, **optimisers})
    store = Clips(clips, device, seed)

    def learn() -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=cuda, cache_enabled=False):
            parts = loss(vae, pixels, weights)
        total = parts["pixels"] + parts["edges"] + KL * parts["divergence"]
        vae.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimiser in optimisers.values():
            optimiser.step()
        return {name: part.detach() for name, part in parts.items()}

    pixels = weights = stage = None
    for step in progress:
        shape = crop if step < 2 * steps // 3 else whole
        for optimiser in optimisers.values():
            set_rate(optimiser, cosine(step, steps, rate, warm=min(300, steps // 10 + 1)))
        if stage is None or pixels.shape != shape:
            stage = None  # frees the last one's memory first
            pixels, weights = (torch.empty(shape[0], n, *shape[2:], device=device) for n in (shape[1], 1))
            stage = Repeated(learn, device)
        store.piece(pixels, weights)
        parts = stage()
        average.update(vae, step)
        progress.log(**parts)
    average.copy_to(vae)
    mean, std = latent_statistics(vae, device, seed, measured)
    torch.save({"state": vae.state_dict(), "mean": mean.tolist(), "std": std.tolist()}, folder / "vae.pt")
    print(f"vae: latents' std {std.min():.3f} … {std.max():.3f}, PSNR of whole clips "
          f"{psnr(vae, device, max(4, measured // 4)):.2f} dB",
          flush=True)


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, device: str, seed: int, clips: int) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel over drawn clips, [16] each. What the encoder is unsure of counts in the std:
    a channel that holds next to nothing is not blown up."""
    means, variances = [], []
    for part in range(max(1, clips // 16)):
        generator = torch.Generator().manual_seed(seed + 104729 + part)
        pixels = draw(random_script(min(16, clips), FRAMES, generator, held_out=False).to(device), FRAMES)
        mean, log_variance = encode(vae, pixels.transpose(1, 2).float() / 127.5 - 1)
        means.append(mean.cpu())
        variances.append(log_variance.exp().mean((0, 2, 3, 4)).cpu())
    every = torch.cat(means)
    unsure = torch.stack(variances).mean(0)
    return every.mean((0, 2, 3, 4)), (every.var((0, 2, 3, 4)) + unsure).sqrt()


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, device: str, clips: int) -> float:
    """Of clips that were not trained on, FRAMES long, through encoder and decoder; dB."""
    pixels = draw(random_script(clips, FRAMES, torch.Generator().manual_seed(-1), held_out=True).to(device), FRAMES)
    pixels = pixels.transpose(1, 2).float() / 127.5 - 1
    errors = [(decode(vae, encode(vae, clip)[0]).clamp(-1, 1) - clip).square().mean() for clip in pixels.split(4)]
    return float(-10 * torch.log10(torch.stack(errors).mean() / 4))  # values have a range of 2


def load(folder: Path, device: str) -> tuple[AutoencoderKLWan, Tensor, Tensor]:
    """The trained VAE, and its latents' mean and std [16, 1, 1]."""
    kept = torch.load(folder / "vae.pt", map_location=device, weights_only=True)
    vae = AutoencoderKLWan(**SIZES, latents_mean=kept["mean"], latents_std=kept["std"])
    vae.load_state_dict(kept["state"])
    return _ready(vae, device)


def load_exported(folder: Path, device: str) -> tuple[AutoencoderKLWan, Tensor, Tensor]:
    """The same from the folder `vae` of a checkpoint, in float32. Raises UserError where a file is missing."""
    folder_files(folder)
    return _ready(AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32), device)


def _ready(vae: AutoencoderKLWan, device: str) -> tuple[AutoencoderKLWan, Tensor, Tensor]:
    mean, std = (torch.tensor(value, device=device).view(-1, 1, 1)
                 for value in (vae.config.latents_mean, vae.config.latents_std))
    return vae.to(device).eval().requires_grad_(False), mean, std
