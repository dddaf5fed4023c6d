import threading
from functools import cached_property

import torch
from torch import Tensor

from wan.kv_cache import KVCache
from wan.model import CausalWan
from wan.rope import RotaryEmbedding

ROOM = 2 << 30  # bytes of GPU memory that a capture is to find


class Captures:
    """What the graphs of an engine's videos share: the passes that were made, so that their kernels are compiled and
    loaded, and the stream on which others are captured."""

    def __init__(self):
        self.made: set[tuple] = set()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()


class GraphedWan:
    """CausalWan whose passes are replayed as CUDA graphs, so that the GPU does not wait for the host between kernels.

    A pass over the same slots of the cache is the same kernels on the same memory: each of a block's passes, and those
    of later blocks when a full ring comes round again. The first is captured if such a pass was made in a video before,
    and it is not the first of this one; else it runs as it is, and the second is captured.
    One for each video, as its cache and `text` are part of the captured memory: write new values into them in place,
    and `forget` where they move.
    """

    def __init__(self, generator: CausalWan, cache: KVCache, text: list[tuple[Tensor, Tensor]], captures: Captures):
        self.generator, self.cache, self.text, self.captures = generator, cache, text, captures
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None  # latents, times and turns of the captured passes
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """Captures anew whatever comes from now on."""
        self.is_first = True  # the next pass, which may fix what later ones find in the cache
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()  # the last graph took the old one with it

    def __call__(self, latents: Tensor, t: float, position: int, rope: RotaryEmbedding,
                 want_flow: bool = True) -> Tensor | None:
        """As CausalWan.forward, for blocks of one shape. What it returns is overwritten by the next call."""
        given = (latents, torch.full(latents.shape[:2], t, dtype=torch.float64, device=latents.device),
                 rope.turns(position, latents.shape[1]))
        if self.cache.window is None:
            return self.generator.flow(*given, self.cache, self.text, want_flow)
        slots = self.cache.slots
        # PyTorch keeps what it plans for a kernel by strides, which the window decides, and for each thread.
        key = (threading.get_ident(), latents.shape, self.cache.window, *slots)
        if self.is_first or key not in self.captures.made:
            flow = self.generator.flow(*given, self.cache, self.text, want_flow)
            self.is_first = False
            self.captures.made.add(key)
            return flow
        if self.inputs is None:
            self.inputs = tuple(torch.empty_like(tensor) for tensor in given)
        for static, tensor in zip(self.inputs, given, strict=True):
            static.copy_(tensor)
        if slots not in self.graphs:
            self.captures.made.discard(key)  # one that can't be captured runs as it is the next time
            self.graphs[slots] = self._capture()
            self.captures.made.add(key)
        graph, flow = self.graphs[slots]
        graph.replay()
        return flow if want_flow else None  # a graph without it would cost more to capture than it saves in minutes

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        if torch.cuda.mem_get_info()[0] < ROOM:
            torch.cuda.empty_cache()  # of videos that are gone; while it captures, PyTorch does not look there
        graph, stream = torch.cuda.CUDAGraph(), self.captures.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                flow = self.generator.flow(*self.inputs, self.cache, self.text)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph, flow
