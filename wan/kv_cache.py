import torch
from torch import Tensor

from wan.rope import RotaryEmbedding, rotate


class KVCache:
    """Self-attention K/V of one video: the first `sink` latents stay for good, the others form a ring.

    keys, values: per layer [B, slots·tokens, H, D]; a slot holds one latent. Keys are stored after absolute RoPE, so
    their order in memory does not matter. `positions[i]` is the index in the video of the latent in slot i.

    window: latents attended to, the present block included; None keeps everything and grows.
    rope: given for relative RoPE, where positions count slots in age order. Turning the sink's keys to sit just
    before the window gives the same attention as re-numbering every slot, and costs `sink` latents a block.
    """

    value_axis = 1  # the axis of `values` that slots follow each other on

    def __init__(self, *, layers: int, batch: int, tokens: int, heads: int, head_dim: int, window: int | None,
                 sink: int, dtype: torch.dtype, device, rope: RotaryEmbedding | None = None):
        if window is not None and not 0 <= sink < window:
            raise ValueError(f"sink={sink} latents must be at least 0 and less than the window of {window}")
        self.tokens, self.window, self.sink, self.rope = tokens, window, sink, rope
        self.positions: list[int] = []
        self._turned = 0  # how far the sink's keys are turned from their absolute positions
        self._sink_keys: list[Tensor] | None = None  # the sink's keys at their absolute positions
        self._block = slice(0, 0)
        shape = [batch, heads, head_dim]
        self.keys, self.values = (
            [torch.empty([*shape[:axis], 0, *shape[axis:]], dtype=dtype, device=device) for _ in range(layers)]
            for axis in (1, self.value_axis)
        )
        self._reserve(window or 0)

    def begin(self, position: int, frames: int) -> None:
        """Picks the slots of the next `frames` latents, the first of which is latent `position` of the video.

        Appends while there is room; then overwrites the oldest latents that are not in the sink. Raises ValueError
        where `frames` latents do not fit there in one piece.
        """
        start = len(self.positions)
        if self.window is None:
            self._reserve(start + frames)
        elif start + frames > self.window:
            ring = range(self.sink, start)
            start = min(ring, key=self.positions.__getitem__) if ring else self.window
            if start + frames > len(self.positions):
                raise ValueError(f"{frames} latents do not fit a window of {self.window} with a sink of {self.sink}: "
                                 f"sink and window - sink must be multiples of the block")
        self.positions[start:start + frames] = range(position, position + frames)
        self._block = slice(start * self.tokens, (start + frames) * self.tokens)
        if self.rope is not None and self.sink:
            self._turn_sink()

    @property
    def slots(self) -> tuple[int, int]:
        """First slot of the present block, and how many slots are filled."""
        return self._block.start // self.tokens, len(self.positions)

    def room(self, layer: int) -> tuple[Tensor, Tensor]:
        """The slots that `begin` picked: where keys and values [B, frames·tokens, H, D] may be made in place, for
        `update` to find them there."""
        return self.keys[layer][:, self._block], self.values[layer][:, self._block]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v [B, frames·tokens, H, D] to the slots that `begin` picked, as often as wanted until the next
        `begin`; not those that were made there. Returns the keys and values to attend to, [B, filled·tokens, H, D],
        the new ones included."""
        for new, place in zip((k, v), self.room(layer), strict=True):
            if new.data_ptr() != place.data_ptr():
                place.copy_(new)
        filled = len(self.positions) * self.tokens
        return self.keys[layer][:, :filled], self.values[layer][:, :filled]

    def rewind(self, keep_sink: bool) -> None:
        """Forgets everything, or everything but the sink, so that the latents that follow are written anew."""
        if keep_sink:
            del self.positions[self.sink:]
        else:
            self.positions, self._sink_keys, self._turned = [], None, 0

    def _reserve(self, latents: int) -> None:
        """Makes room for `latents` slots, doubling so that a growing video copies each entry about once."""
        have = self.keys[0].shape[1] // self.tokens
        if latents > have:
            self._grow((max(latents, 2 * have) - have) * self.tokens)

    def _grow(self, tokens: int) -> None:
        """Makes room for `tokens` more."""
        for store, axis in ((self.keys, 1), (self.values, self.value_axis)):
            for layer, old in enumerate(store):
                more = old.new_empty([*old.shape[:axis], tokens, *old.shape[axis + 1:]])
                store[layer] = torch.cat([old, more], axis)

    def _turn_sink(self) -> None:
        """Turns the sink's keys so that the sink ends where the rest of the window begins."""
        rest = self.positions[self.sink:]
        turn = min(rest) - self.sink - self.positions[0] if rest else self._turned
        if turn == self._turned:
            return
        end = self.sink * self.tokens
        if self._sink_keys is None:
            self._sink_keys = [keys[:, :end].clone() for keys in self.keys]
        shift = self.rope.shift(turn)
        for layer, sink_keys in enumerate(self._sink_keys):
            self._write_sink(layer, rotate(sink_keys, shift))
        self._turned = turn

    def _write_sink(self, layer: int, keys: Tensor) -> None:
        self.keys[layer][:, : keys.shape[1]] = keys
