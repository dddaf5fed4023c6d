"""Where `precision: fp8` is refused, and that it is said in one line."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from pipeline import precision
from pipeline.engine import Engine
from pipeline.precision import check_precision, check_sizes
from scripts import benchmark
from tests.conftest import TINY, assert_complains
from utils.cli import guarded
from utils.config import Config
from utils.errors import UserError
from wan.model import WanConfig

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Has the GPU be as it is said to be: gpu(capability=(8, 0), triton=False, product=fails)."""

    def be(capability=(9, 0), triton: bool = True, product=lambda device: None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(precision, "HAS_TRITON", triton)
        monkeypatch.setattr(precision, "multiply_once", product)

    return be


def fails(device) -> None:
    raise RuntimeError("_scaled_mm:\n not here")


def test_cpu_is_refused_before_anything_is_read():
    with pytest.raises(UserError) as error:
        Engine.from_config(Config(wan_folder="nowhere", device="cpu", precision="fp8"))
    assert str(error.value) == ("precision=fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper, "
                                "Blackwell), the device is cpu; use precision=full")


@pytest.mark.parametrize(("about", "words"), [
    ({"capability": (8, 0)}, ["8.9", "Some GPU, 8.0"]), ({"capability": (7, 5)}, ["8.9", "Some GPU, 7.5"]),
    ({"triton": False}, ["Triton", "pip install triton"]), ({"product": fails}, ["_scaled_mm: not here", "Some GPU"]),
])
def test_gpu_that_can_not_is_refused(gpu, about, words):
    gpu(**about)
    with pytest.raises(UserError) as error:
        check_precision("fp8", CUDA)
    assert "\n" not in str(error.value) and str(error.value).endswith("use precision=full")
    for word in words:
        assert word in str(error.value)
    check_precision("full", CUDA)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpu_that_can_is_taken(gpu, capability):
    gpu(capability)
    check_precision("fp8", CUDA)


def test_amd_is_refused_for_all_its_capability(gpu, monkeypatch):
    gpu((9, 4))
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip="6.4"))
    with pytest.raises(UserError, match="NVIDIA"):
        check_precision("fp8", CUDA)


def test_sizes_that_the_kernels_do_not_have():
    check_sizes("fp8", WanConfig())
    with pytest.raises(UserError, match="heads of 64 or 128 channels, the generator's have 16; use precision=full"):
        check_sizes("fp8", TINY.generator)
    odd = dataclasses.replace(TINY.generator, dim=128, ffn_dim=100)
    with pytest.raises(UserError, match="ffn_dim is a multiple of 16, it is 100"):
        check_sizes("fp8", odd)


def test_benchmark_refuses_it_on_a_cpu(capsys):
    code = guarded(lambda: benchmark.main(["--size", "toy", "--precision", "fp8", "--cold", "0", "device=cpu"]))
    assert code == 2 and "compute capability 8.9" in capsys.readouterr().err


def test_front_end_says_it_in_one_line(run_here):
    import inference

    assert_complains(run_here(inference, "--prompt", "a ball", "precision=fp8"), "precision=fp8", "cpu",
                     "use precision=full")
