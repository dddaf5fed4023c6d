"""KVCache against a plain list of latents, oldest first, that does what the design says and nothing clever."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wan.kv_cache import KVCache
from wan.rope import RotaryEmbedding

LAYERS = 2


@dataclass(frozen=True)
class Setting:
    """How a video is made: sizes in latents, and what happens at each block."""

    block: int
    window: int | None
    sink: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    switches: tuple[bool, ...]  # per block: does a new prompt begin there?
    passes: tuple[int, ...]  # per block: how often its K/V are written
    global_sink: bool
    seed: int

    def cache(self, rope: RotaryEmbedding | None = None) -> KVCache:
        return KVCache(layers=LAYERS, batch=1, tokens=self.tokens, heads=self.heads, head_dim=self.head_dim,
                       window=self.window, sink=self.sink, dtype=self.dtype, device="cpu", rope=rope)


@st.composite
def settings_of_a_video(draw) -> Setting:
    block = draw(st.integers(1, 4))
    sink = block * draw(st.integers(0, 3))
    window = draw(st.none() | st.integers(1, 3).map(lambda blocks: sink + block * blocks))
    count = draw(st.integers(1, 9))
    return Setting(
        block, window, sink, tokens=draw(st.integers(1, 2)), heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([6, 8, 10, 12])), dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        switches=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        passes=tuple(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))),
        global_sink=draw(st.booleans()), seed=draw(st.integers(0, 2**32)),
    )


class PlainCache:
    """The latents to attend to as a list of (position, k, v), oldest first; k and v are [LAYERS, tokens, H, D]."""

    def __init__(self, window: int | None, sink: int):
        self.window, self.sink = window, sink
        self.entries: list[tuple[int, Tensor, Tensor]] = []

    def append(self, position: int, k: Tensor, v: Tensor) -> None:
        self.entries.append((position, k, v))
        if self.window is not None and len(self.entries) > self.window:
            del self.entries[self.sink]  # the oldest that is not in the sink

    def write_again(self, entries: list[tuple[int, Tensor, Tensor]]) -> None:
        self.entries[-len(entries):] = entries

    def rewind(self, keep_sink: bool) -> None:
        self.entries = self.entries[:self.sink] if keep_sink else []


class Video:
    """Makes a video's K/V with a KVCache and a PlainCache side by side, and compares what there is to attend to."""

    def __init__(self, setting: Setting, relative: bool):
        self.setting, self.relative = setting, relative
        self.rope = RotaryEmbedding(setting.head_dim, setting.tokens, 1, "cpu")
        self.cache = setting.cache(self.rope if relative else None)
        self.plain = PlainCache(setting.window, setting.sink)
        self.random = torch.Generator().manual_seed(setting.seed)
        self.position = 0

    def draw(self, frames: int) -> Tensor:
        """Keys, values or queries before RoPE, [LAYERS, frames·tokens, H, D]."""
        s = self.setting
        shape = (LAYERS, frames * s.tokens, s.heads, s.head_dim)
        return torch.randn(shape, dtype=s.dtype, generator=self.random)

    def run(self) -> None:
        s = self.setting
        for switch, passes in zip(s.switches, s.passes, strict=True):
            if switch and self.position > 0:
                self.recache()
            self.write(self.position, s.block, passes)
            self.position += s.block

    def recache(self) -> None:
        s, made = self.setting, self.position
        keep_sink = s.global_sink and s.window is not None and made > s.window
        frames = made if s.window is None else min(made, s.window)
        if keep_sink:
            frames -= s.sink
        self.cache.rewind(keep_sink)
        self.plain.rewind(keep_sink)
        self.write(made - frames, frames, passes=1)

    def write(self, position: int, frames: int, passes: int) -> None:
        self.cache.begin(position, frames)
        for again in range(passes):
            k, v, q = self.draw(frames), self.draw(frames), self.draw(frames)
            parts = zip(k.split(self.setting.tokens, 1), v.split(self.setting.tokens, 1), strict=True)
            entries = [(position + i, *part) for i, part in enumerate(parts)]
            if again:
                self.plain.write_again(entries)
            else:
                for entry in entries:
                    self.plain.append(*entry)
            for layer in range(LAYERS):
                self.compare(layer, position, frames, q[layer], k[layer], v[layer])

    def compare(self, layer: int, position: int, frames: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self.relative:
            keys, values = self.cache.update(layer, turned(k, self.rope, position)[None], v[None])
            got = attend(turned(q, self.rope, position), keys[0], values[0])
            assert (got - self.slot_order_attention(layer, q, frames)).abs().max() < 1e-4
        else:
            keys, values = self.cache.update(layer, k[None], v[None])
            assert latents_in(keys, values, self.setting.tokens) == sorted(
                k[layer].flatten().tolist() + v[layer].flatten().tolist() for _, k, v in self.plain.entries)
        assert sorted(self.cache.positions) == [position for position, _, _ in self.plain.entries]

    def slot_order_attention(self, layer: int, q: Tensor, frames: int) -> Tensor:
        """Attention where position 0 is the oldest latent there is, and the query block has the last positions."""
        k = torch.cat([k[layer] for _, k, _ in self.plain.entries])
        v = torch.cat([v[layer] for _, _, v in self.plain.entries])
        return attend(turned(q, self.rope, len(self.plain.entries) - frames), turned(k, self.rope, 0), v)


def turned(x: Tensor, rope: RotaryEmbedding, position: int) -> Tensor:
    """x [tokens, H, D] of consecutive latents from `position` on, after RoPE, in float64."""
    turns = rope.turns(position, len(x) // len(rope.spatial)).to(torch.complex128)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v of [tokens, H, D] in float64."""
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())


def latents_in(keys: Tensor, values: Tensor, tokens: int) -> list[list[float]]:
    """The numbers of each latent in [1, slots·tokens, H, D], in an order that does not depend on the slots."""
    slots = zip(keys[0].split(tokens), values[0].split(tokens), strict=True)
    return sorted(k.flatten().tolist() + v.flatten().tolist() for k, v in slots)


@settings(max_examples=1000, deadline=None)
@given(settings_of_a_video())
def test_holds_what_a_plain_list_holds(setting):
    Video(setting, relative=False).run()


@settings(max_examples=500, deadline=None)
@given(settings_of_a_video())
def test_relative_positions_count_slots_in_age_order(setting):
    Video(setting, relative=True).run()


SETTING = Setting(block=3, window=9, sink=3, tokens=2, heads=2, head_dim=12, dtype=torch.float32,
                  switches=(False,) * 30, passes=(2,) * 30, global_sink=True, seed=0)


def kv(setting: Setting, frames: int, value: float) -> Tensor:
    return torch.full((1, frames * setting.tokens, setting.heads, setting.head_dim), value, dtype=setting.dtype)


@pytest.mark.parametrize("relative", [False, True])
def test_window_is_one_piece_of_memory_for_good(relative):
    cache = SETTING.cache(RotaryEmbedding(SETTING.head_dim, SETTING.tokens, 1, "cpu") if relative else None)
    places = set()
    for block in range(20):
        if block == 12:
            cache.rewind(keep_sink=True)
        cache.begin(3 * block, 3)
        keys, values = cache.update(0, kv(SETTING, 3, block), kv(SETTING, 3, block))
        for store in (keys, values):
            places.add((store.untyped_storage().data_ptr(), store.untyped_storage().nbytes()))
    numbers = SETTING.window * SETTING.tokens * SETTING.heads * SETTING.head_dim
    assert len(places) == 2
    assert {size for _, size in places} == {numbers * SETTING.dtype.itemsize}


def test_keep_everything_grows_and_forgets_nothing():
    setting = Setting(**{**vars(SETTING), "window": None, "sink": 0})
    cache = setting.cache()
    for block in range(50):
        cache.begin(3 * block, 3)
        keys, values = cache.update(0, kv(setting, 3, block), kv(setting, 3, -block))
        assert keys.shape == values.shape == (1, 3 * (block + 1) * setting.tokens, setting.heads, setting.head_dim)
    assert keys[0, :, 0, 0].reshape(50, -1).unique(dim=1).flatten().tolist() == list(range(50))
    assert torch.equal(keys, -values)


def test_sink_longer_than_one_block_holds_what_was_written_last():
    setting = Setting(**{**vars(SETTING), "window": 12, "sink": 6})
    cache = setting.cache()
    for block in range(10):
        cache.begin(3 * block, 3)
        for denoising_step in range(4):
            cache.update(0, kv(setting, 3, -1 - denoising_step), kv(setting, 3, -1 - denoising_step))
        keys, values = cache.update(0, kv(setting, 3, block), kv(setting, 3, block))
    held = [int(k[0, 0, 0]) for k in keys[0].split(3 * setting.tokens)]
    assert sorted(held) == [0, 1, 8, 9] and torch.equal(keys, values)


@pytest.mark.parametrize("window", [9, None])
def test_what_is_made_in_its_room_need_not_be_written(window):
    setting = Setting(**{**vars(SETTING), "window": window, "sink": 3 if window else 0})
    copied, made = setting.cache(), setting.cache()
    for block in range(8):
        k, v = kv(setting, 3, block), kv(setting, 3, -block)
        for cache in (copied, made):
            cache.begin(3 * block, 3)
        for place, new in zip(made.room(1), (k, v), strict=True):
            place.copy_(new)
        for got, expected in zip(made.update(1, *made.room(1)), copied.update(1, k, v), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("relative", [False, True])
def test_position_200_000(relative):
    video = Video(SETTING, relative)
    video.run()
    video.cache.rewind(keep_sink=True)
    video.plain.rewind(keep_sink=True)
    video.write(200_000, 6, passes=1)  # a re-cache there; the sink is from the start of the video
    for block in range(4):
        video.write(200_006 + 3 * block, 3, passes=2)


def test_turned_sink_does_not_drift_in_a_long_video():
    setting = Setting(**{**vars(SETTING), "dtype": torch.bfloat16})
    rope = RotaryEmbedding(setting.head_dim, setting.tokens, 1, "cpu")
    cache = setting.cache(rope)
    written = torch.randn(1, 6, 2, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    for position in range(0, 1200, 3):
        cache.begin(position, 3)
        keys, _ = cache.update(0, written, written)
    shift = rope.shift(1200 - setting.window).to(torch.complex128)  # from the video's start to just before the ring
    pairs = torch.view_as_complex(written[0].double().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * shift[:, None]).flatten(-2)
    assert (keys[0, :6].double() - expected).abs().max() < 2**-8 * expected.abs().max()  # rounded once


@pytest.mark.parametrize("frames", [[10], [9, 9], [3, 9], [3, 3, 3, 3, 6], [4, 4, 4, 4]])
def test_latents_that_do_not_fit_are_refused(frames):
    cache = SETTING.cache()
    position = 0
    for some in frames[:-1]:
        cache.begin(position, some)
        position += some
    before = list(cache.positions)
    with pytest.raises(ValueError, match=r"do not fit a window of 9 with a sink of 3.*multiples of the block"):
        cache.begin(position, frames[-1])
    assert cache.positions == before


@pytest.mark.parametrize(("window", "sink"), [(3, 3), (3, 6), (3, -1), (0, 0)])
def test_sink_must_leave_room_in_the_window(window, sink):
    with pytest.raises(ValueError, match=f"sink={sink} .*window of {window}"):
        Setting(**{**vars(SETTING), "window": window, "sink": sink}).cache()
