"""Which matrix products, attentions and convolutions a block is made of: shapes, numbers of calls, arithmetic.

They are those of the plain mathematics: recorded from a session on PyTorch's meta device, where tensors have shapes and
no values, and where no operation is fused.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from demo.random_weights import Sizes
from scripts.benchmarking.random_engine import meta_engine
from utils.config import Config
from utils.timing import Stopwatch
from wan.attention import attention
from wan.kernels.conv import conv3d

Draw = Callable[..., Tensor]  # sizes → random values on the device and in the dtype that are measured
Ways = dict[str, Callable[[], Tensor]]  # an operation on random values, in each form in which it could be done


@dataclass(frozen=True)
class Gemm:
    """A linear layer: [rows, inputs] → [rows, outputs]."""

    kind: ClassVar[str] = "gemm"
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def bind(self, draw: Draw) -> Ways:
        x, weight, bias = draw(self.rows, self.inputs), draw(self.outputs, self.inputs), draw(self.outputs)
        return {"linear": lambda: F.linear(x, weight, bias)}

    def __str__(self) -> str:
        return f"{self.rows} × {self.inputs} → {self.outputs}"


@dataclass(frozen=True)
class Attend:
    """Attention without a mask."""

    kind: ClassVar[str] = "attention"
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.head_dim

    def bind(self, draw: Draw) -> Ways:
        q, k, v = (draw(self.batch, tokens, self.heads, self.head_dim) for tokens in (self.queries, self.keys,
                                                                                      self.keys))
        return {"attention": lambda: attention(q, k, v)}

    def __str__(self) -> str:
        return f"{self.queries} × {self.keys}, {self.batch * self.heads} heads of {self.head_dim}"


@dataclass(frozen=True)
class Conv:
    """A convolution over 2 or 3 axes. inputs: [B, C, …]; weight: [C', C, …]."""

    kind: ClassVar[str] = "conv"
    inputs: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def flops(self) -> int:
        sizes = zip(self.inputs[2:], self.weight[2:], self.stride, self.padding, strict=True)
        positions = math.prod((size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes)
        return 2 * self.inputs[0] * positions * math.prod(self.weight)

    def bind(self, draw: Draw) -> Ways:
        """Channels-last: the form in which convolutions are fastest."""
        form = torch.channels_last if len(self.stride) == 2 else torch.channels_last_3d
        x, weight = (draw(*shape).contiguous(memory_format=form) for shape in (self.inputs, self.weight))
        if len(self.stride) == 2:
            return {"conv2d": lambda: F.conv2d(x, weight, None, self.stride, self.padding)}
        if set(self.stride) != {1}:
            return {"conv3d": lambda: F.conv3d(x, weight, None, self.stride, self.padding)}
        last = x.permute(0, 2, 3, 4, 1)
        ways = {"conv3d": lambda: conv3d(last, weight, None)}
        if weight.shape[2] > 1 and self.padding[0] == 0:
            ways |= self._over_images(x, weight)
        return ways

    def _over_images(self, x: Tensor, weight: Tensor) -> Ways:
        """The same over images alone: of frames that lie in each other's channels, and as a sum, a term for each frame
        that a filter sees. The first leaves out what it takes to put them there."""
        taps = weight.shape[2]
        frames = x.shape[2] - taps + 1
        images = x.transpose(1, 2)  # [B, T, C, H, W]
        stacked = torch.cat([images[:, i:i + frames] for i in range(taps)], 2).flatten(0, 1)
        stacked = stacked.contiguous(memory_format=torch.channels_last)
        filters = [part.contiguous(memory_format=torch.channels_last) for part in weight.unbind(2)]
        wide = torch.cat(filters, 1).contiguous(memory_format=torch.channels_last)
        parts = [images[:, i:i + frames].flatten(0, 1) for i in range(taps)]

        def summed() -> Tensor:
            y = F.conv2d(parts[0], filters[0], None, 1, self.padding[1:])
            for part, one in zip(parts[1:], filters[1:], strict=True):
                y += F.conv2d(part, one, None, 1, self.padding[1:])
            return y

        return {"conv2d of stacked frames": lambda: F.conv2d(stacked, wide, None, 1, self.padding[1:]),
                "sum of conv2d": summed}

    def __str__(self) -> str:
        kernel, sizes = ("×".join(map(str, axes)) for axes in (self.weight[2:], self.inputs[2:]))
        return f"{kernel} {self.weight[1]} → {self.weight[0]} on {self.inputs[0]}×{sizes}"


Operation = Gemm | Attend | Conv


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Gemm:
    return Gemm(x.numel() // x.shape[-1], x.shape[-1], weight.shape[0])


def _attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Attend:
    batch, heads, queries, head_dim = q.shape
    return Attend(batch, heads, queries, k.shape[2], head_dim)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> Conv:
    axes = weight.dim() - 2

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * axes if isinstance(value, int) else tuple(value)

    if groups != 1 or set(each(dilation)) != {1}:
        raise NotImplementedError(f"a convolution with groups={groups}, dilation={dilation} is not counted")
    return Conv(tuple(x.shape), tuple(weight.shape), each(stride), each(padding))


KNOWN = {F.linear: _linear, F.scaled_dot_product_attention: _attend, F.conv2d: _conv, F.conv3d: _conv}


class _Stages(Stopwatch):
    """Knows which stage a session is in."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.now = ""

    @contextmanager
    def stage(self, name: str):
        before, self.now = self.now, name
        yield
        self.now = before


class _Recorder(TorchFunctionMode):
    """Counts the operations in `KNOWN`, by stage."""

    def __init__(self, stages: _Stages):
        super().__init__()
        self.stages = stages
        self.counts: dict[str, Counter[Operation]] = defaultdict(Counter)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in KNOWN:
            self.counts[self.stages.now][KNOWN[func](*args, **kwargs)] += 1
        return func(*args, **kwargs)


def operations_of_a_block(config: Config, sizes: Sizes | str) -> dict[str, Counter[Operation]]:
    """{stage: {operation: calls}} of a steady block, one with the window full: "denoise" (all its steps), "clean pass"
    and "decode"; and of a prompt switch then: "text" and "re-cache".

    Raises ValueError for a config that keeps everything: its blocks are never steady.
    """
    if config.window is None:
        raise ValueError("model_kwargs.local_attn_size=-1 keeps everything, so no block costs what the last one did")
    session = meta_engine(config, sizes).session(seed=0)
    session.watch = stages = _Stages()
    session.set_prompt("a")
    session.step()  # the first block is decoded in a way of its own
    steps, session.steps = session.steps, session.steps[:1]  # shapes take time too: no more passes than it needs
    for _ in range(config.window // config.num_frame_per_block):
        session.step_latents()
    session.steps = steps
    with _Recorder(stages) as steady:
        session.step()
    session.set_prompt("bb")
    session.steps = steps[:1]
    with _Recorder(stages) as switch:
        session.step_latents()
    return dict(steady.counts) | {name: switch.counts[name] for name in ("text", "re-cache")}
