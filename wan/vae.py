from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.attention import one_head
from wan.causal_conv import CausalConv3d
from wan.frame_ring import HISTORY, FrameRing
from wan.kernels import EPS, conv2d_of_twice
from wan.kernels.conv import conv3d
from wan.vae_decoder import Decoder, VAEDecoder

TOGETHER = 1  # up-blocks that take all latents of a call at once; one latent fills a GPU, and the memory, after those


class WanVAE:
    """The decoder of Wan's VAE, for normalised latents. Weights only: `stream()` makes the state."""

    def __init__(self, model: VAEDecoder):
        self.model = model.eval().requires_grad_(False)

    @property
    def parameter(self) -> Tensor:
        return self.model.post_quant_conv.weight

    def to(self, device: torch.device) -> "WanVAE":
        """Moves the weights; the decoder's convolutions get them channels-last, as `WanStream` keeps its frames."""
        self.model.to(device)
        for module in self.model.decoder.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                form = torch.channels_last if module.weight.dim() == 4 else torch.channels_last_3d
                module.weight.data = module.weight.data.contiguous(memory_format=form)
        return self

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and std of the latents, [16]."""
        like = {"dtype": self.parameter.dtype, "device": self.parameter.device}
        config = self.model.config
        return torch.tensor(config.latents_mean, **like), torch.tensor(config.latents_std, **like)

    def stream(self) -> "WanStream":
        """The decoder state of a new video."""
        return WanStream(self)


class WanStream:
    """Decodes one video block by block; the same frames as diffusers' AutoencoderKLWan gives for all its latents
    together.

    It has the state that lasts from block to block: the last inputs of each causal convolution. Frames are kept
    channels-last, [B, T, H, W, C], which convolutions read fastest and where a norm over channels is one over
    neighbours in memory; norm, SiLU and bias are one pass over them.

    A convolution's last inputs are copied from block to block, but those of the larger frames, in the last up-blocks,
    are kept in rings where convolutions can be read from one.
    """

    def __init__(self, vae: WanVAE):
        self.to_decoder, self.decoder = vae.model.post_quant_conv, vae.model.decoder
        self.mean, self.std = vae._statistics()
        self.history: dict[nn.Module, Tensor] = {}  # of each causal convolution, its last inputs [B, 2, …]
        self.rings: dict[Turns, FrameRing] = {}
        self.in_turn = _in_turn(self.decoder)
        self.started = False
        self.patch = vae.model.config.patch_size or 1  # each position of the last map is patch × patch pixels

    def __call__(self, latents: Tensor) -> Tensor:
        """The video's next latents [B, F, 16, h, w] → their frames [B, T, 3, H, W] in [-1, 1]; T = 4F, or 4F−3 at
        the start of the video."""
        x = latents.permute(0, 1, 3, 4, 2).to(self.mean.dtype) * self.std + self.mean
        x = conv3d(x, self.to_decoder.weight, self.to_decoder.bias)
        # The first latent of a video is decoded by itself, as it becomes one frame.
        parts = [x] if self.started else x.tensor_split([1], dim=1)
        frames = torch.cat([self._decode(part) for part in parts if part.shape[1]], 1)
        return rearrange(frames.clamp(-1, 1), "b t h w (c q p) -> b t c (h p) (w q)", p=self.patch, q=self.patch)

    def _decode(self, x: Tensor) -> Tensor:
        """Latents [B, F, h, w, C] → their frames [B, 4F, H, W, 3], or the first latent [B, 1, h, w, C] → one."""
        latents, decoder = x.shape[1], self.decoder
        x = self._causal(decoder.conv_in, x)
        x = self._residual(decoder.mid_block.resnets[0], x)
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            x = self._residual(resnet, self._attention(attention, x))
        for block in decoder.up_blocks[:TOGETHER]:
            x = self._up(block, x)
        frames = torch.cat([self._finish(latent) for latent in x.chunk(latents, dim=1)], 1)
        self.started = True
        return frames

    def _finish(self, x: Tensor) -> Tensor:
        """The frames of one latent, from what the first up-blocks made of it."""
        for block in self.decoder.up_blocks[TOGETHER:]:
            x = self._up(block, x)
        return self._causal(self.decoder.conv_out, x, self.decoder.norm_out)

    def _up(self, block: nn.Module, x: Tensor) -> Tensor:
        for resnet in block.resnets:
            x = self._residual(resnet, x)
        for upsampler in block.upsamplers or []:
            x = self._upsample(upsampler, x)
        return x

    def _causal(self, conv: CausalConv3d, x: Tensor, norm: nn.Module | None = None, bias_before: Tensor | None = None,
                add_own_bias: bool = True, skip: Tensor | None = None) -> Tensor:
        """Convolves x, of which first SiLU(norm(x + bias_before)) where a norm is given, with what came before it;
        skip is added to the result."""
        bias = conv.bias if add_own_bias else None
        if conv in self.in_turn and conv.reads_rings(x):
            ring, start = self._into_ring(conv, x, norm, bias_before)
            return conv.of_ring(ring, start, HISTORY + x.shape[1], bias, skip)
        whole = conv.room(x, HISTORY + x.shape[1])
        whole[:, :HISTORY] = self.history.get(conv, 0)
        conv.write(x, norm, bias_before, out=whole[:, HISTORY:])
        self.history[conv] = whole[:, -HISTORY:].clone()
        return conv(whole, bias, skip)

    def _into_ring(self, conv: CausalConv3d, x: Tensor, norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, int]:
        """Writes SiLU(norm(x + bias)) after the history whose turn it is. Returns the ring's frames, and the first that
        this history begins at."""
        turns = self.in_turn[conv]
        if turns not in self.rings:
            self.rings[turns] = FrameRing(turns.convolutions, turns.frames, conv.room(x, 0))
        start, places = self.rings[turns].turn(x.shape[1])
        for some, place in places:
            conv.write(x[:, some], norm, bias, out=place)
        return self.rings[turns].frames, start

    def _residual(self, block: nn.Module, x: Tensor) -> Tensor:
        """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); the first convolution's bias is added by the pass after it."""
        h = self._causal(block.conv1, x, block.norm1, add_own_bias=False)
        skip = x if isinstance(block.conv_shortcut, nn.Identity) else _pointwise(block.conv_shortcut, x)
        return self._causal(block.conv2, h, block.norm2, bias_before=block.conv1.bias, skip=skip)

    def _attention(self, block: nn.Module, x: Tensor) -> Tensor:
        """x + attention of one head among the positions of each frame."""
        batch, frames, height, width, channels = x.shape
        y = F.rms_norm(x, (channels,), block.norm.gamma.flatten(), EPS)
        q, k, v = _pointwise(block.to_qkv, y).reshape(batch * frames, height * width, -1).chunk(3, -1)
        return x + _pointwise(block.proj, one_head(q, k, v).view(x.shape))

    def _upsample(self, block: nn.Module, x: Tensor) -> Tensor:
        """Twice the rows and columns and, where the block says so, twice the frames; but the first latent of a video
        stays one frame, and the convolution over time starts after it."""
        if block.mode == "upsample3d" and self.started:
            pairs = self._causal(block.time_conv, x)  # the two frames of each lie in its channels
            x = pairs.unflatten(-1, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
        batch, conv = len(x), block.resample[1]
        return conv2d_of_twice(x.flatten(0, 1), conv.weight, conv.bias).unflatten(0, (batch, -1))


class Turns(NamedTuple):
    """Convolutions that run one after the other, on as many channels as they make."""

    block: int  # which up-block they are in
    convolutions: int
    frames: int  # of a latent


def _in_turn(decoder: Decoder) -> dict[nn.Module, Turns]:
    """Of the up-blocks that take a latent at a time."""
    found, frames = {}, 1
    for index, block in enumerate(decoder.up_blocks):
        convolutions = [conv for resnet in block.resnets for conv in (resnet.conv1, resnet.conv2)
                        if conv.in_channels == conv.out_channels]
        if index >= TOGETHER:
            found |= dict.fromkeys(convolutions, Turns(index, len(convolutions), frames))
        frames *= 2 ** sum(upsampler.mode == "upsample3d" for upsampler in block.upsamplers or [])
    return found


def _pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A 1×1 or 1×1×1 convolution of x [..., C]."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)
