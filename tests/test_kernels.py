"""The operations for a CPU against their plain versions; tests/test_gpu.py does the same for a GPU."""

import pytest
import torch

from wan import kernels
from wan.kernels.conv import conv3d, conv3d_of_pairs, conv3d_of_ring, conv3d_plain
from wan.kernels.hopper import agrees, numbers
from wan.rope import RotaryEmbedding

SHAPES = [(1, 4, 14, 24, 8), (2, 3, 5, 7, 12), (1, 1, 2, 1, 3)]  # frames [B, T, H, W, C]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_silu_with_and_without_bias_fills_only_its_frames(shape):
    x, gamma, bias = draw(*shape), draw(shape[-1]), draw(shape[-1]) * 3
    x[0, 0, 0, 0] = 0
    for some_bias in (None, bias):
        expected = kernels.norm_silu_plain(x, gamma, some_bias)
        whole = torch.full((shape[0], shape[1] + 2, *shape[2:]), 7.0)
        kernels.norm_silu(x.clone(), gamma, some_bias, whole[:, 2:])
        assert_close(whole[:, 2:], expected)
        assert (whole[:, :2] == 7).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_and_skip(shape):
    x, bias, skip = draw(*shape), draw(shape[-1]), draw(*shape).flip(0)
    assert_close(kernels.add_bias(x.clone(), bias, skip), kernels.add_bias_plain(x, bias, skip))


@pytest.mark.parametrize("batch,height,width,channels,out", [(1, 5, 4, 8, 3), (3, 1, 2, 6, 8), (2, 1, 1, 1, 1)])
def test_convolution_of_twice_the_rows_and_columns(batch, height, width, channels, out):
    x, weight, bias = draw(batch, height, width, channels), draw(out, channels, 3, 3), draw(out)
    got = kernels.conv2d_of_twice(x, weight, bias)
    assert got.shape == (batch, 2 * height, 2 * width, out)
    assert_close(got, kernels.conv2d_of_twice_plain(x, weight, bias))


@pytest.mark.parametrize("way", [conv3d, conv3d_plain, conv3d_of_pairs])
def test_every_way_of_a_convolution_is_the_same(way):
    x, weight, bias, skip = draw(2, 4, 5, 6, 8), draw(3, 8, 3, 3, 3), draw(3), draw(2, 2, 5, 6, 3)
    expected = torch.nn.functional.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=(0, 1, 1))
    expected = expected.permute(0, 2, 3, 4, 1)
    assert_close(way(x, weight, bias), expected)
    assert_close(way(x, weight, None), expected - bias)
    assert_close(way(x, weight, bias, skip), expected + skip)


@pytest.mark.parametrize("start,frames", [(0, 7), (5, 4), (2, 3)])
def test_convolution_of_a_ring_is_that_of_its_frames_in_a_row(start, frames):
    ring, weight, bias, skip = draw(2, 7, 5, 6, 8), draw(3, 8, 3, 3, 3), draw(3), draw(2, frames - 2, 5, 6, 3)
    x = torch.stack([ring[:, (start + i) % 7] for i in range(frames)], 1)
    assert_close(conv3d_of_ring(ring, start, frames, weight, bias, skip), conv3d(x, weight, bias, skip))


def test_sums_and_their_norms_are_those_of_the_parts():
    x, y, gate, scale, shift = (draw(2, 3, 5, 16), draw(2, 3, 5, 16).flip(0), *draw(2, 3, 3, 16).split(1, 2))
    weight, bias = draw(16), draw(16).flip(0)
    total, normed = kernels.gated_norm(x, gate, y, weight, bias, 1e-6)
    assert_close(total, x + gate * y)
    assert_close(normed, torch.nn.functional.layer_norm(x + gate * y, (16,), weight, bias, 1e-6))
    total, normed = kernels.add_modulate(x, y, shift, scale, 1e-6)
    assert_close(total, x + y)
    assert_close(normed, kernels.modulate_plain(x + y, shift, scale, 1e-6))


def test_norm_and_rope_of_both_are_those_of_each():
    q, k, weight = draw(2, 6, 24), draw(2, 6, 24).flip(1), draw(24)
    turns = RotaryEmbedding(12, 1, 2, "cpu").turns(5, 3)
    both = kernels.rms_rope_both(q, k, weight, weight.flip(0), 1e-6, turns)
    for got, x, own in zip(both, (q, k), (weight, weight.flip(0)), strict=True):
        assert torch.equal(got, kernels.rms_rope(x, own, 1e-6, turns))


def test_linear_layer_that_may_write_into_given_memory():
    x, weight, bias, out = draw(2, 10, 24), draw(40, 24), draw(40), torch.empty(2, 10, 40)
    assert torch.equal(kernels.linear(x, weight, bias, out), torch.nn.functional.linear(x, weight, bias))


def test_linear_and_gelu():
    x, weight, bias = draw(2, 3, 10, 24) * 5, draw(40, 24), draw(40)
    assert_close(kernels.linear_gelu(x, weight, bias), kernels.linear_gelu_plain(x, weight, bias))


def test_other_types_take_the_plain_versions():
    x, gamma = draw(*SHAPES[0], dtype=torch.bfloat16), draw(SHAPES[0][-1], dtype=torch.bfloat16)
    out = torch.empty_like(x)
    kernels.norm_silu(x, gamma, gamma, out)
    assert torch.equal(out, kernels.norm_silu_plain(x, gamma, gamma).bfloat16())


def test_results_do_not_depend_on_the_number_of_threads():
    frames, gamma = draw(2, 3, 14, 24, 64), draw(64)
    weight, wide = draw(32, 64, 3, 3), draw(96, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            out = torch.empty_like(frames)
            kernels.norm_silu(frames.clone(), gamma, gamma, out)
            results.append([out, kernels.add_bias(frames.clone(), gamma, frames),
                            kernels.conv2d_of_twice(frames[0], weight, gamma[:32]),
                            kernels.linear_gelu(frames, wide, wide[:, 0])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, expected in zip(other[:2], results[0][:2], strict=True):
            assert torch.equal(got, expected)
        for got, expected in zip(other[2:], results[0][2:], strict=True):  # products, which libraries sum as they like
            assert_close(got, expected)


@pytest.mark.parametrize("once,reason", [
    (lambda x: (x @ torch.zeros(3), x), "inconsistent tensor size"),
    (lambda x: (1.2 * x, x), "the kernel is off by 0.20"),
    (lambda x: (x * float("nan"), x), "the kernel is off by nan"),
])
def test_what_a_gpu_can_not_do_is_told_and_done_otherwise(once, reason, caplog):
    x = numbers(2, device=torch.device("cpu"))
    assert agrees(lambda: (1.01 * x, x), "Otherwise") and not caplog.records
    assert not agrees(lambda: once(x), "Otherwise")
    assert caplog.messages[0].startswith(f"Otherwise: {reason}") and "\n" not in caplog.messages[0]


def test_no_memory_now_says_nothing_of_a_kernel():
    def once():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        agrees(once, "Otherwise")
