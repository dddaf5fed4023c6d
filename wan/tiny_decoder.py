"""A tiny decoder for Wan 2.1's latents, in the layout of the published `taew2_1.pth` (TAEHV by Ollin Boer Bohan).

Lower quality than the VAE, at a small part of its cost. Frames [N, C, h, w] are kept channels-last, which convolutions
read fastest.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.kernels import conv2d_of_twice

DROPPED = 3  # frames at the start of a video, made from zero history


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class Memory(nn.Module):
    """Residual block that sees its own input of the frame before: ReLU(convs([x, past]) + skip(x))."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * inputs, outputs), nn.ReLU(), _conv(outputs, outputs), nn.ReLU(),
                                  _conv(outputs, outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], 1)) + self.skip(x))


class Grow(nn.Module):
    """One frame [N, C, h, w] → `frames` frames, in order along N."""

    def __init__(self, channels: int, frames: int):
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(channels, channels * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "n (f c) h w -> (n f) h w c", f=self.frames).movedim(-1, 1)


class Twice(nn.Conv2d):
    """A convolution of twice the rows and columns."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.weight.new_zeros(self.out_channels)
        return conv2d_of_twice(x.movedim(1, -1).contiguous(), self.weight, bias).movedim(-1, 1)


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _widths(state: dict[str, Tensor]) -> list[int]:
    """Widths of the four stages, read off a state dict."""
    return [state[f"decoder.{i}.weight"].shape[0] for i in (1, 8, 14, 20)]


class TinyDecoder(nn.Module):
    """Weights only: `stream()` makes the state. Parameter names are TAEHV's."""

    def __init__(self, latent_channels: int, widths: list[int]):
        super().__init__()
        a, b, c, d = widths
        layers = [Squash(), _conv(latent_channels, a), nn.ReLU()]
        for width, following, frames in ((a, b, 1), (b, c, 2), (c, d, 2)):
            layers += [Memory(width, width) for _ in range(3)]
            # In TAEHV frames are enlarged in the first's place. Grow works on each pixel by itself: it can go before.
            layers += [nn.Identity(), Grow(width, frames), Twice(width, following, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(d, 3))

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> "TinyDecoder":
        """A decoder of the sizes that a state dict has. Raises KeyError where it is not of this layout."""
        return cls(state["decoder.1.weight"].shape[1], _widths(state))

    def stream(self) -> "TinyStream":
        """The decoder state of a new video."""
        return TinyStream(self.to(memory_format=torch.channels_last))

    def decode(self, latents: Tensor) -> Tensor:
        """All latents of a video at once, [B, F, 16, h, w] → [B, 4F−3, 3, H, W] in [-1, 1]."""
        return self.stream()(latents)


class TinyStream:
    """Decodes one video block by block. State: the last input of each memory block."""

    def __init__(self, weights: TinyDecoder):
        self.weights = weights
        self.past: dict[int, Tensor] = {}
        self.drop = DROPPED

    def __call__(self, latents: Tensor) -> Tensor:
        """The video's next latents [B, F, 16, h, w] → their frames [B, T, 3, H, W] in [-1, 1]; T = 4F, or 4F−3 at
        the start of the video."""
        x = latents.to(next(self.weights.parameters()).dtype)
        batch = len(x)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # frames of one video lie together
        for i, layer in enumerate(self.weights.decoder):
            if isinstance(layer, Memory):
                past = torch.empty_like(x)
                frames, before = x.unflatten(0, (batch, -1)), past.unflatten(0, (batch, -1))
                before[:, 1:] = frames[:, :-1]
                before[:, 0] = self.past.get(i, 0)
                self.past[i] = frames[:, -1].clone()
                x = layer(x, past)
            else:
                x = layer(x)
        frames = x.unflatten(0, (batch, -1))[:, self.drop:]
        self.drop = 0
        return frames.clamp(0, 1) * 2 - 1
