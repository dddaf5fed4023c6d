"""Videos that the generator makes while it is trained: as `Session` makes them, four steps a block over a K/V cache."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from demo.training.clips import BLOCK
from demo.training.generator import GENERATOR, SHIFT, SINK, WINDOW, new_rope
from demo.world import HEIGHT, WIDTH
from pipeline.sampler import timesteps
from wan.geometry import PIXELS
from wan.kv_cache import KVCache
from wan.model import CausalWan

SIGMAS = [t / 1000 for t in timesteps([1000, 750, 500, 250], SHIFT, warp=True)]  # of the student's four steps


def new_cache(batch: int, device: str, dtype: torch.dtype) -> KVCache:
    _, ph, pw = GENERATOR.patch_size
    return KVCache(layers=GENERATOR.num_layers, batch=batch, tokens=(HEIGHT // PIXELS // ph) * (WIDTH // PIXELS // pw),
                   heads=GENERATOR.num_heads, head_dim=GENERATOR.head_dim, window=WINDOW * BLOCK, sink=SINK * BLOCK,
                   dtype=dtype, device=device)


def embed(text: nn.Module, ids: Tensor) -> Tensor:
    """Token ids [N, n] → embeddings [N, n, dim], zero after the end."""
    with torch.no_grad():
        mask = ids > 0
        return text(input_ids=ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]


class Tape:
    """A K/V cache that lets gradients through the block that is being written."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.start = cache.slots[0] * cache.tokens
        self.end = self.start + BLOCK * cache.tokens

    def room(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.cache.room(layer)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        every = self.cache.update(layer, k.detach(), v.detach())
        return tuple(torch.cat([x[:, :self.start], own.to(x.dtype), x[:, self.end:]], 1)
                     for x, own in zip(every, (k, v), strict=True))


class Videos:
    """A batch of videos in the making, as `Session` makes one: noise, cache, prompts, latest latents.

        videos.begin(); x0 = videos.denoise(); videos.remember(x0); videos.finish(x0)

    What `denoise` and `remember` compute with stays where it is in memory, from one video to the next too, so that they
    can be recorded as CUDA graphs, one for each `cache.slots`. The other two keep the books.
    """

    def __init__(self, fast: CausalWan, embeds: Tensor):
        self.fast, self.embeds = fast, embeds.clone()
        weight = fast.patch_embedding.weight
        self.cache = new_cache(len(embeds), weight.device.type, weight.dtype)
        self.rope = new_rope(weight.device.type)
        self.text = fast.encode_text(embeds)
        self.turns = self.rope.turns(0, BLOCK)  # of the present block
        shape = (len(embeds), BLOCK, GENERATOR.in_dim, HEIGHT // PIXELS, WIDTH // PIXELS)
        self.shown = torch.zeros(WINDOW - 1, *shape, device=embeds.device)  # the blocks that the present one attends to
        self.latest = torch.zeros(shape, device=embeds.device)
        self.restart(embeds)

    def restart(self, embeds: Tensor) -> None:
        """New videos in place of these."""
        self.block = 0
        self.ahead = 0  # latents that all but the sink are further from the start than they were made
        self.sink: list[Tensor] = []
        self.recent: list[Tensor] = []  # the latest WINDOW blocks
        self.cache.rewind(keep_sink=False)
        self._tell(embeds)

    def position(self, block: int) -> int:
        """Index of a block's first latent."""
        return BLOCK * block + self.ahead

    def past(self) -> Tensor:
        """What the present block attends to, the sink and the latest of the window: clean blocks [n, B, F, C, h, w]."""
        return self.shown[:min(self.block, WINDOW - 1)]

    def begin(self) -> None:
        """The next block."""
        position = self.position(self.block)
        self.cache.begin(position, BLOCK)
        self.turns.copy_(self.rope.turns(position, BLOCK))
        rest = min(self.block - SINK, WINDOW - SINK - 1)
        for place, latents in zip(self.past(), self.sink + self.recent[len(self.recent) - max(0, rest):], strict=True):
            place.copy_(latents)

    def denoise(self, flow: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """The block's latents, by four steps from noise. flow(step, noisy latents): in place of the videos' own."""
        x = torch.randn_like(self.latest)
        for i, sigma in enumerate(SIGMAS):
            x0 = x - sigma * (flow(i, x) if flow else self.flow(x, sigma))
            if i + 1 < len(SIGMAS):
                x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * torch.randn_like(x0)
        return x0

    def flow(self, x: Tensor, sigma: float, model: CausalWan | None = None, cache: Tape | None = None,
             text: list | None = None) -> Tensor:
        """The flow of the block's latents x at σ: of the videos' own model, or of another over the same cache."""
        times = torch.full(x.shape[:2], 1000 * sigma, dtype=torch.float64, device=x.device)
        return (model or self.fast).flow(x, times, self.turns, cache or self.cache, text or self.text)

    def remember(self, x0: Tensor) -> None:
        """Leaves the block's clean K/V in the cache, and its latents in `latest`."""
        self.flow(x0, 0.0)
        self.latest.copy_(x0)

    def finish(self, x0: Tensor) -> None:
        """Goes on to the next block."""
        if self.block < SINK:
            self.sink.append(x0)
        self.recent = [*self.recent, x0][-WINDOW:]
        self.block += 1

    def switch(self, embeds: Tensor) -> None:
        """New prompts from the next block on, with a re-cache."""
        self._tell(embeds)
        self._refresh(keep_sink=self.block > WINDOW)

    def jump(self, latents: int) -> None:
        """Moves the window so far away from the sink, as if all that time had gone by."""
        self.ahead += latents
        self._refresh(keep_sink=True)

    def _tell(self, embeds: Tensor) -> None:
        self.embeds.copy_(embeds)
        for kept, new in zip(self.text, self.fast.encode_text(embeds), strict=True):
            for place, values in zip(kept, new, strict=True):
                place.copy_(values)

    def _refresh(self, keep_sink: bool) -> None:
        blocks = self.recent[SINK:] if keep_sink else self.recent
        first = self.position(self.block - len(blocks))
        self.cache.rewind(keep_sink)
        self.cache.begin(first, BLOCK * len(blocks))
        self.fast(torch.cat(blocks, 1), 0.0, first, self.rope, self.cache, self.text)
