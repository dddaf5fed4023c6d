import torch
from torch import Tensor, nn

from wan.kernels import rms_rope
from wan.kernels.fp8 import E4M3, Held, scale_of, write_keys, write_less_mean, write_values
from wan.kv_cache import KVCache
from wan.rope import frame_pairs

HEADROOM = 16  # how much larger than the first block's a value may be; four of e4m3's fifteen doublings
ALIGNMENT = 16  # bytes; GPUs copy tiles only of rows that begin at multiples of it


class QuantisedKVCache(KVCache):
    """A KVCache that holds 8 bits of each number, in half the memory, and returns what `wan.kernels.fp8.attention`
    takes.

    keys: per layer int8 [B, slots·tokens, H, D], key_scales: float32 [B, H, slots·tokens]; values: e4m3
    [B, H, D, slots·tokens].

    Each head has one scale for its values, and one vector that is taken from its keys, their mean: softmax does not see
    what all keys have in common, and without it they are rounded less (SageAttention, arXiv:2410.02367). The first
    block that is written fixes both, until everything is forgotten; so all keys that a query meets lack the same
    vector, which makes this exact in any order of blocks, and is why it need not be the mean of later ones. Channels
    that turn with the frame keep theirs, which would soon point elsewhere.

    The keys of a latent share a scale in each head: attention is faster where scales seldom change, and keys, which are
    normalised, differ little in size.
    """

    value_axis = 3

    def __init__(self, *, layers: int, batch: int, heads: int, dtype: torch.dtype, device, **sizes):
        """As of a KVCache. dtype: of the sink's keys, which relative RoPE turns before they are rounded."""
        self.key_scales = [torch.empty(batch, heads, 0, device=device) for _ in range(layers)]
        super().__init__(layers=layers, batch=batch, heads=heads, dtype=E4M3, device=device, **sizes)
        self._dtype = dtype
        self._fixed: dict[int, tuple[Tensor, Tensor]] = {}  # layer → mean [B, H, D], scale of values [B, H]

    def update(self, layer: int, k: Tensor, v: Tensor) -> Held:
        """As KVCache.update."""
        self._look_at(layer, k, v)
        self._write_rounded(layer, k, self._block)
        return self._take_values(layer, v)

    def write(self, layer: int, k: Tensor, v: Tensor, norm: nn.RMSNorm, turns: Tensor) -> Held:
        """`update` with the keys [B, S, dim] before norm and RoPE; v [B, S, H, D]."""
        if layer not in self._fixed or self._sink_tokens():
            self._look_at(layer, rms_rope(k, norm.weight, norm.eps, turns), v)
        write_keys(k, norm.weight, norm.eps, turns, self._fixed[layer][0], self.keys[layer][:, self._block],
                   self.key_scales[layer][..., self._block], self.tokens)
        return self._take_values(layer, v)

    def rewind(self, keep_sink: bool) -> None:
        super().rewind(keep_sink)
        if not keep_sink:
            self._fixed = {}

    def _take_values(self, layer: int, v: Tensor) -> Held:
        _, value_scale = self._fixed[layer]
        write_values(v, value_scale, self.values[layer][..., self._block])
        filled = len(self.positions) * self.tokens
        return Held(self.keys[layer][:, :filled], self.values[layer][..., :filled],
                    self.key_scales[layer][..., :filled], value_scale, self.tokens)

    def _look_at(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Takes from unrounded k and v [B, S, H, D] what is to be known of them."""
        if layer not in self._fixed:
            mean = k.float().mean(1)
            mean[..., : 2 * frame_pairs(k.shape[-1])] = 0
            self._fixed[layer] = (mean, scale_of(v, (1, 3), HEADROOM)[:, 0, :, 0])
        if count := self._sink_tokens():
            if self._sink_keys is None:
                shape = [keys.shape for keys in self.keys]
                self._sink_keys = [k.new_empty(s[0], self.sink * self.tokens, *s[2:], dtype=self._dtype) for s in shape]
            start = self._block.start
            self._sink_keys[layer][:, start : start + count] = k[:, :count]

    def _sink_tokens(self) -> int:
        """How many tokens of the present block are of a sink that will be turned."""
        end = min(self._block.stop, self.sink * self.tokens)
        return max(0, end - self._block.start) if self.rope is not None else 0

    def _grow(self, tokens: int) -> None:
        super()._grow(tokens + -(self.keys[0].shape[1] + tokens) % ALIGNMENT)
        for layer, keys in enumerate(self.keys):
            self.keys[layer] = keys.view(torch.int8)  # KVCache makes keys and values of one type
            old = self.key_scales[layer]
            more = old.new_empty(*old.shape[:2], keys.shape[1] - old.shape[2])
            self.key_scales[layer] = torch.cat([old, more], 2)

    def _write_sink(self, layer: int, keys: Tensor) -> None:
        self._write_rounded(layer, keys, slice(0, keys.shape[1]))

    def _write_rounded(self, layer: int, keys: Tensor, where: slice) -> None:
        write_less_mean(keys, self._fixed[layer][0], self.keys[layer][:, where], self.key_scales[layer][..., where],
                        self.tokens)
