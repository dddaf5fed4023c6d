"""The tables that a person reads, from what is saved as JSON."""

from typing import Any

ROWS = ["latents", "frames", "frames_per_second", "block", "denoise", "clean pass", "decode", "re-cache", "encode",
        "first_frame", "switch_to_frame", "flatness", "peak_gpu_gib", "peak_gpu_growth_mib", "host_gib",
        "host_growth_mib"]
NO_ROOFLINE = "no roofline: model_kwargs.local_attn_size=-1 keeps everything, so no block costs what the last one did"
NO_BUSY = "no GPU, or the profiler saw no kernels on it: its busy share is left out"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _videos(videos: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'times in ms':20}" + "".join(f"{video['name']:>16}" for video in videos)]
    for row in ROWS:
        values = [(video | video["stages"]).get(row) for video in videos]
        lines.append(f"{row.replace('_', ' '):20}" + "".join(f"{_number(value, 3):>16}" for value in values))
    return lines


def _roofline(roofline: dict[str, Any]) -> list[str]:
    lines = [f"{'roofline':20}{'measured ms':>12}{'ceiling ms':>12}{'fraction':>10}{'TFLOP/s: gemm':>15}"
             f"{'attention':>11}{'conv':>8}"]
    for name, stage in roofline["stages"].items():
        speeds = [stage["kinds"].get(kind, {}).get("tflop_per_s") for kind in ("gemm", "attention", "conv")]
        lines.append(f"{name:20}{_number(stage['measured_ms']):>12}{_number(stage['ceiling_ms']):>12}"
                     f"{_number(stage['fraction']):>10}{_number(speeds[0], 1):>15}{_number(speeds[1], 1):>11}"
                     f"{_number(speeds[2], 1):>8}")
    return lines


def _busy(busy: dict[str, Any]) -> list[str]:
    lines = [f"GPU busy {100 * busy['busy']:.1f} % of {busy['blocks']} steady blocks, {busy['kernels_per_block']:.0f} "
             f"kernels and copies a block; most time:"]
    return lines + [f"{kernel['ms_per_block']:10.2f} ms {100 * kernel['share']:5.1f} % "
                    f"{kernel['calls_per_block']:8.1f}x  {kernel['name'][:84]}" for kernel in busy["top"][:10]]


def text(results: dict[str, Any]) -> str:
    """The tables of a whole run."""
    lines = [results["title"], results["waiting"], *_videos(results["videos"])]
    first = results["first_frame"]
    for number, cold in enumerate(first["cold"], 1):
        lines.append(f"first frame, cold, process {number}: {cold['seconds']} s ({cold['start_and_imports']} s start "
                     f"and imports, {cold['weights']} s weights drawn, {cold['first_block']} s first block)")
    lines.append(f"first frame, second video of the process: {_number(first['warm_ms'])} ms")
    lines += _roofline(results["roofline"]) if results["roofline"] else [NO_ROOFLINE]
    lines += _busy(results["busy"]) if results["busy"] else [NO_BUSY]
    if at_once := results["at_once"]:
        each = ", ".join(f"{video['frames_per_second']}" for video in at_once["videos"])
        lines.append(f"{at_once['processes']} processes at once: {at_once['frames_per_second']} frames/s together "
                     f"(each: {each})")
    return "\n".join(lines)
