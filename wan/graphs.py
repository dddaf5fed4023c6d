from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wan.kv_cache import KVCache
from wan.model import CausalWan
from wan.rope import RotaryEmbedding

# Passes that each generator has run: the latents' shape and the cache's slots. Their kernels are compiled and loaded.
_ran: WeakKeyDictionary[CausalWan, set[tuple]] = WeakKeyDictionary()


class GraphedWan:
    """CausalWan whose passes are replayed as CUDA graphs, so that the GPU does not wait for the host between kernels.

    A pass over the same slots of the cache is the same kernels on the same memory: each of a block's passes, and those
    of later blocks when a full ring comes round again. The first is captured, unless the generator never made such a
    pass before, nor the cache any; it runs as it is then, and the second is captured.
    One for each video, as its cache and `text` are part of the captured memory: write new values into them in place,
    and `forget` where they move.
    """

    def __init__(self, generator: CausalWan, cache: KVCache, text: list[tuple[Tensor, Tensor]]):
        self.generator, self.cache, self.text = generator, cache, text
        self.ran = _ran.setdefault(generator, set())
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None  # latents, times and turns of the captured passes
        self.stream = torch.cuda.Stream()
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
        slots = self.cache.slots
        key = (latents.shape, *slots)
        if self.is_first or key not in self.ran or self.cache.window is None:
            self.is_first = False
            self.ran.add(key)
            return self.generator.flow(*given, self.cache, self.text, want_flow)
        if self.inputs is None:
            self.inputs = tuple(torch.empty_like(tensor) for tensor in given)
        for static, tensor in zip(self.inputs, given, strict=True):
            static.copy_(tensor)
        if slots not in self.graphs:
            self.graphs[slots] = self._capture()
        graph, flow = self.graphs[slots]
        graph.replay()
        return flow if want_flow else None  # a graph without it would cost more to capture than it saves in minutes

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                flow = self.generator.flow(*self.inputs, self.cache, self.text)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, flow
