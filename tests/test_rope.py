import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wan.rope import RotaryEmbedding, rotate

ROWS, COLUMNS = 3, 4
POSITIONS = st.integers(0, 300_000)


def reference_turns(head_dim: int, position: int, frames: int) -> np.ndarray:
    """Token by token and pair by pair, as written in the design; complex128."""
    pairs = head_dim // 2
    spatial = pairs // 3
    axes = (pairs - 2 * spatial, spatial, spatial)
    angles = [
        [where * 10000.0 ** (-j / n) for where, n in zip((frame, row, column), axes, strict=True) for j in range(n)]
        for frame in range(position, position + frames) for row in range(ROWS) for column in range(COLUMNS)
    ]
    return np.exp(1j * np.array(angles, dtype=np.float64))


@pytest.mark.parametrize("position", [0, 1000, 1023, 1024, 1025, 1026, 200_000])
@pytest.mark.parametrize("head_dim", [6, 64, 128])
def test_turns_are_exact_at_any_position(head_dim, position):
    turns = RotaryEmbedding(head_dim, ROWS, COLUMNS, "cpu").turns(position, 3)
    expected = reference_turns(head_dim, position, 3)
    assert turns.shape == expected.shape == (3 * ROWS * COLUMNS, head_dim // 2)
    assert np.abs(turns.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize(("head_dim", "frame", "spatial"), [(64, 12, 10), (128, 22, 21)])
def test_pairs_are_split_over_the_axes(head_dim, frame, spatial):
    turns = RotaryEmbedding(head_dim, ROWS, COLUMNS, "cpu").turns(5, 2).unflatten(0, (2, ROWS, COLUMNS))
    moves = [(turns[1, 0, 0] != turns[0, 0, 0]), (turns[0, 1, 0] != turns[0, 0, 0]), (turns[0, 0, 1] != turns[0, 0, 0])]
    assert [move.nonzero().flatten().tolist() for move in moves] == [
        list(range(frame)), list(range(frame, frame + spatial)), list(range(frame + spatial, head_dim // 2))]


def test_rotate_turns_adjacent_pairs_of_channels():
    quarter = torch.tensor([[1j, 1, -1]], dtype=torch.complex64)
    x = torch.arange(1.0, 13).reshape(1, 2, 1, 6)
    assert rotate(x, quarter).flatten().tolist() == [-2, 1, 3, 4, -5, -6, -8, 7, 9, 10, -11, -12]
    assert rotate(x.bfloat16(), quarter).dtype == torch.bfloat16


@settings(deadline=None)
@given(p=POSITIONS, d=st.integers(-1000, 1000), move=POSITIONS, seed=st.integers(0, 2**32))
def test_scores_depend_on_the_difference_of_positions_only(p, d, move, seed):
    rope = RotaryEmbedding(24, ROWS, COLUMNS, "cpu")
    random = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, ROWS * COLUMNS, 2, 24, generator=random)

    def scores(query: int, key: int) -> torch.Tensor:
        q_turned, k_turned = (rotate(x, rope.turns(at, 1)) for x, at in ((q, query), (k, key)))
        return torch.einsum("bqhd,bkhd->bhqk", q_turned, k_turned)

    base = 1000  # keeps p + d at or above 0
    assert (scores(base + p, base + p + d) - scores(base + p + move, base + p + move + d)).abs().max() < 1e-4
    assert (scores(base + p, base + p + d) - scores(base + p, base + p + d + 1)).abs().max() > 1e-2


@settings(deadline=None)
@given(p=POSITIONS, n=st.integers(-1000, 300_000), head_dim=st.sampled_from([6, 12, 64, 128]))
def test_shift_is_a_difference_of_turns(p, n, head_dim):
    rope = RotaryEmbedding(head_dim, ROWS, COLUMNS, "cpu")
    p += 1000  # keeps p + n at or above 0
    assert (rope.turns(p, 2) * rope.shift(n) - rope.turns(p + n, 2)).abs().max() < 1e-6


def test_shift_of_tokens_is_the_same_as_turning_them_there():
    rope = RotaryEmbedding(64, ROWS, COLUMNS, "cpu")
    x = torch.randn(1, 2 * ROWS * COLUMNS, 2, 64, generator=torch.Generator().manual_seed(0))
    moved = rotate(rotate(x, rope.turns(3, 2)), rope.shift(200_000))
    assert (moved - rotate(x, rope.turns(200_003, 2))).abs().max() < 1e-5
