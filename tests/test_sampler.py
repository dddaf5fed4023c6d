import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampler import denoise_block, shifted_sigma, timesteps
from tests.conftest import GOLDEN
from tests.parity import tensors

STEPS = [1000, 750, 500, 250]
SHARES = st.floats(0, 1)
SHIFTS = st.floats(0.1, 20)


def test_warped_timesteps_of_the_default_list():
    assert timesteps(STEPS, shift=5.0, warp=True) == pytest.approx([1000, 937.5, 833.3333333333, 625])


@pytest.mark.parametrize("name", ["single", "switch_reset_sink", "endless_rope"])
def test_warped_timesteps_are_the_recorded_ones(name):
    recorded, case = tensors(GOLDEN / f"{name}.safetensors")
    assert timesteps(case["steps"], shift=5.0, warp=True) == pytest.approx(recorded["timesteps"].tolist(), rel=1e-6)


@given(st.lists(st.integers(1, 1000), min_size=1))
def test_warped_list_indexes_the_shifted_table_from_its_end(steps):
    table = [1000 * 5 * s / (1 + 4 * s) for s in (1 - i / 1000 for i in range(1000))]
    assert timesteps(steps, shift=5.0, warp=True) == pytest.approx([table[1000 - step] for step in steps])


@given(st.lists(st.integers(1, 1000), min_size=1), SHIFTS)
def test_unwarped_list_is_the_timesteps_themselves(steps, shift):
    assert timesteps(steps, shift, warp=False) == steps


@given(SHARES, SHARES, SHIFTS)
def test_shifted_sigma(s, other, shift):
    sigma = shifted_sigma(s, shift)
    assert sigma == pytest.approx(shift * s / (1 + (shift - 1) * s))
    assert 0 <= sigma <= 1 + 1e-12
    assert shifted_sigma(0, shift) == 0 and shifted_sigma(1, shift) == pytest.approx(1)
    assert shifted_sigma(s, 1) == s
    if other < s:
        assert shifted_sigma(other, shift) <= sigma
    if sigma < 1 and shift >= 1:
        assert sigma >= s - 1e-12  # towards noise


class Ideal:
    """A network that knows the clean latents: v = (x − x0)/σ. Keeps what it was given."""

    def __init__(self, clean: torch.Tensor):
        self.clean, self.calls = clean, []

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        self.calls.append((x, t))
        return (x - self.clean) / (t / 1000)


def block(seed: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(1, 3, 4, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))


STEP_LISTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True).map(lambda s: sorted(s)[::-1])


@given(STEP_LISTS, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_ideal_flow_recovers_the_clean_latents(steps, warp, dtype):
    flow, fresh = Ideal(block(0, dtype)), []

    def renoise(i: int) -> torch.Tensor:
        fresh.append(i)
        return block(100 + i, dtype)

    got = denoise_block(flow, block(1, dtype), timesteps(steps, 5.0, warp), renoise)
    assert got.dtype == dtype
    assert (got - flow.clean).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
    assert len(flow.calls) == len(steps)
    assert fresh == list(range(len(steps) - 1))


def test_network_sees_start_noise_then_fresh_noise_at_each_sigma():
    flow, steps = Ideal(block(0)), timesteps(STEPS, 5.0, warp=True)
    denoise_block(flow, block(1), steps, lambda i: block(100 + i))
    assert [t for _, t in flow.calls] == steps
    assert torch.equal(flow.calls[0][0], block(1))
    for i, (x, t) in enumerate(flow.calls[1:]):
        expected = (1 - t / 1000) * flow.clean + t / 1000 * block(100 + i)
        assert (x - expected).abs().max() < 1e-12


def test_flow_that_is_wrong_leaves_its_error_times_sigma():
    wrong = 0.1
    got = denoise_block(lambda x, t: Ideal(block(0))(x, t) + wrong, block(1), timesteps(STEPS, 5.0, warp=True),
                        lambda i: block(100 + i))
    assert torch.allclose(got, block(0) - 0.625 * wrong)
