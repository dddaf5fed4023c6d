import torch
from torch import Tensor

from wan.kv_cache import KVCache
from wan.model import CausalWan
from wan.rope import RotaryEmbedding


class GraphedWan:
    """CausalWan whose passes are replayed as CUDA graphs, so that the GPU does not wait for the host between kernels.

    A pass over the same slots of the cache is the same kernels on the same memory. In a full ring a few slots come
    round again and again: the first pass over them runs as it is, the second is captured, those after it are replayed.
    One for each video, as its cache and `text` are part of the captured memory: write new values into them in place,
    and `forget` where they move.
    """

    def __init__(self, generator: CausalWan, cache: KVCache, text: list[tuple[Tensor, Tensor]]):
        self.generator, self.cache, self.text = generator, cache, text
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self.inputs: tuple[Tensor, Tensor, Tensor] | None = None  # latents, times and turns of the captured passes
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def forget(self) -> None:
        """Captures anew whatever comes from now on."""
        self.seen.clear()
        self.graphs.clear()
        self.pool = torch.cuda.graph_pool_handle()  # the last graph took the old one with it

    def __call__(self, latents: Tensor, t: float, position: int, rope: RotaryEmbedding,
                 want_flow: bool = True) -> Tensor | None:
        """As CausalWan.forward, for blocks of one shape. What it returns is overwritten by the next call."""
        given = (latents, torch.full(latents.shape[:2], t, dtype=torch.float64, device=latents.device),
                 rope.turns(position, latents.shape[1]))
        key = (*self.cache.slots, want_flow)
        if key not in self.seen or not self.cache.is_full:
            self.seen.add(key)
            return self.generator.flow(*given, self.cache, self.text, want_flow)
        if self.inputs is None:
            self.inputs = tuple(torch.empty_like(tensor) for tensor in given)
        for static, tensor in zip(self.inputs, given, strict=True):
            static.copy_(tensor)
        if key not in self.graphs:
            self.graphs[key] = self._capture(want_flow)
        graph, flow = self.graphs[key]
        graph.replay()
        return flow

    def _capture(self, want_flow: bool) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                flow = self.generator.flow(*self.inputs, self.cache, self.text, want_flow)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, flow
