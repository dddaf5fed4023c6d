"""scripts/benchmark.py: what it writes, and that it counts arithmetic right. Speed itself is not asserted."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts import benchmark
from scripts.benchmarking import gpu_use, picture, roofline
from scripts.benchmarking.operations import Attend, Conv, Gemm, operations_of_a_block
from scripts.benchmarking.random_engine import meta_engine, random_engine
from scripts.benchmarking.videos import flatness
from tests.conftest import TINY
from utils.config import Config, ModelKwargs
from utils.errors import UserError

# 48×32 pixels: 4×6 latent positions, 2×3 tokens a latent; 18 tokens a block, 36 in the window.
CONFIG = Config(height=32, width=48, device="cpu", model_kwargs=ModelKwargs(local_attn_size=6, sink_size=3))
# No two sizes alike, so that no two operations are.
SIZES = dataclasses.replace(TINY, generator=dataclasses.replace(TINY.generator, ffn_dim=80, text_dim=24))
DIM, FFN, LAYERS = SIZES.generator.dim, SIZES.generator.ffn_dim, SIZES.generator.num_layers


@pytest.fixture(scope="module")
def operations():
    return operations_of_a_block(CONFIG, SIZES)


def of_kind(counts: Counter, kind: type) -> dict:
    return {operation: calls for operation, calls in counts.items() if isinstance(operation, kind)}


def test_flops_are_two_for_each_multiplication_and_addition():
    assert Gemm(rows=5, inputs=3, outputs=7).flops == 2 * 5 * 3 * 7
    assert Attend(batch=1, heads=2, queries=5, keys=9, head_dim=4).flops == 2 * (2 * 5 * 9 * 4) * 2
    # 3×3 over 4×6 positions with a border of zeros; 2 of 4 frames left without one.
    assert Conv((1, 8, 4, 4, 6), (16, 8, 3, 3, 3), (1, 1, 1), (0, 1, 1)).flops == 2 * (2 * 4 * 6 * 16) * (8 * 27)
    assert Conv((1, 16, 3, 4, 6), (32, 16, 1, 2, 2), (1, 2, 2), (0, 0, 0)).flops == 2 * (3 * 2 * 3 * 32) * (16 * 4)


def test_calls_of_a_denoising_pass(operations):
    """Four steps, each of them every layer: 4 square products in self-attention, 2 in cross-attention, the two of the
    feed-forward network, and the head."""
    gemms = of_kind(operations["denoise"], Gemm)
    assert gemms == {
        Gemm(3, 16, DIM): 4, Gemm(3, DIM, DIM): 4, Gemm(3, DIM, 6 * DIM): 4,
        Gemm(18, DIM, DIM): 4 * LAYERS * 6, Gemm(18, DIM, FFN): 4 * LAYERS, Gemm(18, FFN, DIM): 4 * LAYERS,
        Gemm(18, DIM, 64): 4,
    }
    assert of_kind(operations["denoise"], Attend) == {
        Attend(1, 2, 18, 36, 16): 4 * LAYERS, Attend(1, 2, 18, 512, 16): 4 * LAYERS}
    assert of_kind(operations["denoise"], Conv) == {
        Conv((1, 16, 3, 4, 6), (DIM, 16, 1, 2, 2), (1, 2, 2), (0, 0, 0)): 4}


def test_last_layer_of_a_clean_pass_only_remembers(operations):
    gemms = of_kind(operations["clean pass"], Gemm)
    assert gemms[Gemm(18, DIM, DIM)] == (LAYERS - 1) * 6 + 2
    assert gemms[Gemm(18, DIM, FFN)] == LAYERS - 1 and Gemm(18, DIM, 64) not in gemms
    assert of_kind(operations["clean pass"], Attend)[Attend(1, 2, 18, 36, 16)] == LAYERS - 1


def test_re_cache_makes_the_window_anew_but_for_the_sink(operations):
    assert of_kind(operations["re-cache"], Attend)[Attend(1, 2, 18, 36, 16)] == LAYERS - 1  # 6 latents, 3 of them sink
    assert of_kind(operations["text"], Gemm)== {
        Gemm(512, 24, DIM): 1, Gemm(512, DIM, DIM): 1 + 2 * LAYERS}


def test_first_and_last_convolution_of_the_decoder(operations):
    convolutions = of_kind(operations["decode"], Conv)
    first, *_, last = convolutions
    assert (first.weight, convolutions[first]) == ((16, 16, 1, 1, 1), 1)
    assert (last.inputs[2:], last.weight[0], convolutions[last]) == ((6, 32, 48), 3, 3)  # 4 frames and 2 of the past


@pytest.mark.parametrize("decoder", ["wan", "taehv"])
def test_sum_is_what_pytorch_counts(decoder):
    config = dataclasses.replace(CONFIG, vae=decoder, vae_ckpt="random")
    session = meta_engine(config, SIZES).session(seed=0)
    session.set_prompt("a")
    for _ in range(3):
        session.step()
    with FlopCounterMode(display=False) as counter:
        session.step()
    stages = operations_of_a_block(config, SIZES)
    ours = sum(op.flops * calls for stage in roofline.BLOCK_STAGES for op, calls in stages[stage].items())
    assert ours == counter.get_total_flops()


def test_nothing_is_counted_where_the_cache_grows_for_ever():
    config = dataclasses.replace(CONFIG, model_kwargs=ModelKwargs(local_attn_size=-1))
    with pytest.raises(ValueError, match="local_attn_size=-1"):
        operations_of_a_block(config, SIZES)


@torch.inference_mode()
def test_operations_can_be_done(operations):
    for operation in {op for counts in operations.values() for op in counts}:
        ways = operation.bind(lambda *sizes: torch.randn(sizes, dtype=torch.bfloat16, device="meta"))
        for way, call in ways.items():
            with FlopCounterMode(display=False) as counter:
                call()
            assert counter.get_total_flops() == operation.flops, (operation, way)


@torch.inference_mode()
def test_every_way_of_a_convolution_gives_the_same():
    ways = Conv((1, 5, 6, 8, 7), (4, 5, 3, 3, 3), (1, 1, 1), (0, 1, 1)).bind(torch.randn)
    assert len(ways) == 3
    expected = ways.pop("conv3d")()[0]  # [T, H, W, C]
    for call in ways.values():
        torch.testing.assert_close(call().permute(0, 2, 3, 1), expected, rtol=1e-4, atol=1e-4)


def test_summary_multiplies_calls_and_times():
    product, attend = Gemm(10, 10, 10), Attend(1, 1, 10, 10, 10)
    operations = {"denoise": Counter({product: 4, attend: 2}), "decode": Counter({product: 1})}
    seconds = {product: {"linear": 0.001}, attend: {"a": 0.02, "b": 0.01}}
    table = roofline.summary(operations, seconds, {"denoise": 48.0, "block": 100.0})
    assert table["stages"]["denoise"]["ceiling_ms"] == pytest.approx(24)
    assert table["stages"]["denoise"]["fraction"] == pytest.approx(0.5)
    assert table["stages"]["decode"]["fraction"] is None
    assert table["stages"]["block"]["ceiling_ms"] == pytest.approx(25)
    assert table["kinds"]["gemm"]["calls"] == 5
    assert table["kinds"]["gemm"]["tflop_per_s"] == pytest.approx(2000 / 0.001 / 1e12)
    assert table["operations"][1]["ways"] == {"a": 20, "b": 10} and table["operations"][1]["ms"] == 10
    assert table["operations"][0]["calls"] == {"denoise": 4, "decode": 1}


def test_flatness_is_the_end_over_latent_30():
    walls = [9.0] * 10 + [2.0] * 5 + [7.0] * 10 + [3.0] * 10
    assert flatness(walls, block=3) == 1.5
    assert flatness(walls[:24], block=3) is None


def test_busy_time_counts_what_overlaps_once():
    assert gpu_use.union([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    event = {"cat": "kernel", "name": "a", "dur": 500.0}
    events = [event | {"ts": 0.0}, event | {"ts": 250.0}, {"cat": "gpu_memcpy", "name": "b", "ts": 900.0, "dur": 100.0},
              {"cat": "cuda_runtime", "name": "launch", "ts": 0.0, "dur": 1000.0}, {"ph": "M"}]
    use = gpu_use.summarise(events, wall=0.001, blocks=2)
    assert use["busy"] == pytest.approx(0.85) and use["kernels_per_block"] == 1.5
    assert (use["long_gaps_per_block"], use["long_gaps_ms_per_block"]) == (0.5, 0.07)  # of the 0.15 ms before the copy
    assert [(kernel["name"], kernel["calls_per_block"]) for kernel in use["top"]] == [("a", 1), ("b", 0.5)]
    assert use["pauses_ms_per_block"] == 0.07
    assert use["idle_after"] == [{"name": "a", "ms_per_block": 0.075, "pauses_per_block": 0.5}]
    assert gpu_use.summarise([{"cat": "cpu_op", "ts": 0, "dur": 1}], 1.0, 1) is None


def test_a_pause_is_that_of_the_kernel_that_ended_last():
    spans = {"long": (0, 10), "short": (1, 2), "next": (12, 13), "at once": (13, 15), "end": (18, 19)}
    events = [{"name": name, "ts": start, "dur": end - start} for name, (start, end) in reversed(spans.items())]
    assert gpu_use.pauses(events) == [("long", 2), ("at once", 3)]
    assert gpu_use.pauses([]) == []


def test_tiny_decoder_stands_in_for_the_vae(tmp_path):
    engine = random_engine(dataclasses.replace(CONFIG, vae="taehv", vae_ckpt="random"), SIZES)
    session = engine.session()
    session.set_prompt("a")
    assert session.step().shape == (9, 32, 48, 3)


@pytest.mark.parametrize("also,message", [(["height=48"], "--also height=48: its length in latents comes first"),
                                          (["0", "height=48"], "--also 0: its length in latents comes first"),
                                          (["9", "vea=taehv"], "unknown key vea; did you mean vae?")])
def test_a_further_video_that_cannot_be_made_is_told_before_the_others_are(also, message, monkeypatch):
    monkeypatch.setattr(benchmark, "run", None)
    with pytest.raises(UserError, match=message):
        benchmark.main(["--size", "toy", "device=cpu", "--also", *also])


def test_whole_run(tmp_path, capsys):
    file = tmp_path / "results.json"
    benchmark.main(["--size", "toy", "height=32", "width=48", "model_kwargs.local_attn_size=6", "device=cpu",
                    "denoising_step_list=[1000]", "--latents", "9", "--switches", "1", "--long", "12", "--cold", "1",
                    "--gpus", "2", "--json", str(file),
                    "--also", "9", "height=48", "vae=taehv", "vae_ckpt=random", "--also", "9", "width=32"])
    results = json.loads(file.read_text("utf-8"))
    names = ["first", "single-9", "switches-9", "absolute-12", "endless-12", "also-1-9", "also-2-9"]
    assert [video["name"] for video in results["videos"]] == names
    for video in results["videos"]:
        assert video["frames"] == 4 * video["latents"] - 3 and len(video["block_series"]) == video["latents"] // 3
        assert {"denoise", "decode", "encode"} <= set(video["stages"])
    assert results["videos"][2]["switch_to_frame"] > 0 and results["videos"][2]["stages"]["re-cache"] > 0
    assert results["first_frame"]["warm_ms"] > 0 and results["first_frame"]["cold"][0]["seconds"] > 0
    assert results["at_once"]["processes"] == 2 and len(results["at_once"]["videos"]) == 2
    assert "attention" in results["title"] or "math" in results["title"]  # by which back end
    assert results["config"]["height"] == 32 and results["busy"] is None
    for stage in ("denoise", "clean pass", "decode", "re-cache", "block"):
        assert results["roofline"]["stages"][stage]["fraction"] > 0, stage
    assert {"gemm", "attention", "conv"} == set(results["roofline"]["kinds"])
    printed = capsys.readouterr().out
    assert "no GPU" in printed and all(name in printed for name in names)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"title": "a run"}))  # that was stopped before its first video
    benchmark.main(["--compare", str(file), str(other)])
    printed = capsys.readouterr().out
    assert "other: a run (it did not end)" in printed
    rows = dict(line.rsplit(maxsplit=1) for line in printed.splitlines()[3:])
    assert float(rows["decode, ms"]) > 0 and float(rows["share of the roofline, block"]) > 0
    assert float(rows["height=48 vae=taehv vae_ckpt=random: frames/s"]) > 0 and float(rows["width=32: block, ms"]) > 0
    assert rows["GPU busy, %"] == "-" and float(rows["re-cache, ms"]) > 0


def test_picture_of_saved_results(tmp_path):
    pytest.importorskip("matplotlib")
    stage = {"ceiling_ms": 1.0, "kinds": {}}
    video = {"name": "single-9", "latents_of_block": 3, "block_series": [1.0, 2.0, 3.0], "block": 3.0,
             "stages": {"denoise": 1.0, "decode": 1.0}}
    results = {"title": "a run", "steady": "single-9", "videos": [video],
               "roofline": {"stages": {"denoise": stage, "decode": stage}, "kinds": {"gemm": {"ms": 2.0}}}}
    assert picture.draw(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_choice_is_refused(run_script):
    outcome = run_script("scripts/benchmark.py", "--decoder", "other")
    assert outcome.code == 2 and "wan" in outcome.err and "taehv" in outcome.err


def test_what_a_fresh_process_refuses_is_refused_in_a_line(run_script):
    refused = run_script("scripts/benchmark.py", "--precision", "fp8", "--size", "toy", "device=cpu")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "precision=fp8 needs an NVIDIA GPU" in refused.err
