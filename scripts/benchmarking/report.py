"""The tables that a person reads, from what is saved as JSON."""

from typing import Any

from scripts.benchmarking.gpu_use import LONG_GAP

ROWS = ["latents", "frames", "frames_per_second", "block", "denoise", "clean pass", "decode", "re-cache", "encode",
        "first_frame", "switch_to_frame", "flatness", "peak_gpu_gib", "peak_gpu_growth_mib", "host_gib",
        "host_growth_mib"]
NO_ROOFLINE = "no roofline: --roofline 0, or local_attn_size=-1, where no block costs what the last one did"
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
             f"kernels and copies a block; pauses of more than {LONG_GAP} ms: {busy['long_gaps_per_block']} a block, "
             f"{busy['long_gaps_ms_per_block']} ms together; most time:"]
    lines += [f"{kernel['ms_per_block']:10.2f} ms {100 * kernel['share']:5.1f} % "
              f"{kernel['calls_per_block']:8.1f}x  {kernel['name'][:84]}" for kernel in busy["top"][:10]]
    lines.append(f"GPU idle {busy['wall_ms_per_block'] - busy['busy_ms_per_block']:.2f} ms a block, "
                 f"{busy['pauses_ms_per_block']:.2f} of them between kernels; most after:")
    return lines + [f"{pause['ms_per_block']:10.2f} ms "
                    f"{1000 * pause['ms_per_block'] / pause['pauses_per_block']:5.1f} µs"
                    f" {pause['pauses_per_block']:7.1f}x  {pause['name'][:84]}" for pause in busy["idle_after"]]


def text(results: dict[str, Any]) -> str:
    """The tables of a whole run."""
    lines = [results["title"], results["waiting"], *_videos(results["videos"])]
    first = results["first_frame"]
    for number, cold in enumerate(first["cold"], 1):
        caches = "caches as they were found" if number == 1 else "files and kernels cached by the one before"
        lines.append(f"first frame, fresh process {number}, {caches}: {cold['seconds']} s "
                     f"({cold['start_and_imports']} s start and imports, {cold['weights']} s weights drawn, "
                     f"{cold['first_block']} s first block)")
    lines.append(f"first frame, second video of the process: {_number(first['warm_ms'])} ms")
    lines += _roofline(results["roofline"]) if results["roofline"] else [NO_ROOFLINE]
    lines += _busy(results["busy"]) if results["busy"] else [NO_BUSY]
    if at_once := results["at_once"]:
        each = ", ".join(f"{video['frames_per_second']}" for video in at_once["videos"])
        lines.append(f"{at_once['processes']} processes at once: {at_once['frames_per_second']} frames/s together "
                     f"(each: {each})")
    return "\n".join(lines)


def _summary(results: dict[str, Any]) -> dict[str, Any]:
    """What counts of a whole run."""
    videos = {video["name"]: video for video in results["videos"]}
    steady, stages = videos[results["steady"]], {}
    for video in (*videos.values(), steady):
        stages |= video["stages"]  # a re-cache is another video's
    cold, roofline, busy = results["first_frame"]["cold"], results["roofline"], results["busy"]
    also = {}
    for number, (latents, *settings) in enumerate(results["also"], 1):
        video, name = videos.pop(f"also-{number}-{latents}"), " ".join(settings)
        also |= {f"{name}: frames/s": video["frames_per_second"], f"{name}: block, ms": video["block"],
                 f"{name}: decode, ms": video["stages"]["decode"], f"{name}: peak, GiB": video["peak_gpu_gib"],
                 f"{name}: last blocks to latent 30": video["flatness"]}
    return {
        "latents": steady["latents"], "frames/s end to end": steady["frames_per_second"], "block, ms": steady["block"],
        "denoising and clean pass, ms": stages["denoise"] + stages.get("clean pass", 0.0),
        "decode, ms": stages["decode"], "re-cache, ms": stages.get("re-cache"),
        "switch to first frame, ms": results["switch_to_frame_ms"],
        "first frame, fresh process, s": min((one["seconds"] for one in cold), default=None),
        "first frame, second video, ms": results["first_frame"]["warm_ms"],
        "peak GPU memory, GiB": max(video["peak_gpu_gib"] for video in videos.values()),
        **{f"{name}: last blocks to latent 30": video["flatness"] for name, video in videos.items()
           if video["flatness"] is not None},
        "GPU busy, %": busy and 100 * busy["busy"],
        "share of the roofline, block": roofline and roofline["stages"]["block"]["fraction"],
        **{row: value for row, value in also.items() if value is not None},
    }


def side_by_side(runs: dict[str, dict[str, Any]]) -> str:
    """What counts of several runs, a column for each. runs: {name: what is saved as JSON}; one that did not end is left
    out."""
    columns = {name: _summary(results) for name, results in runs.items() if "roofline" in results}
    lines = [f"{name}: {runs[name].get('title', 'it did not begin')}{'' if name in columns else ' (it did not end)'}"
             for name in runs]
    lines.append(f"{'':64}" + "".join(f"{name:>14}" for name in columns))
    for row in dict.fromkeys(row for summary in columns.values() for row in summary):
        lines.append(f"{row:64}" + "".join(f"{_number(summary.get(row)):>14}" for summary in columns.values()))
    return "\n".join(lines)
