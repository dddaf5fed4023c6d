"""A picture of a run: block time against index, and a block's phases beside the roofline."""

from pathlib import Path
from typing import Any

from scripts.benchmarking.roofline import BLOCK_STAGES

KINDS = ("gemm", "attention", "conv")
COLOURS = {"denoise": "#7fb3d5", "clean pass": "#a9cce3", "decode": "#f5b7b1", "rest": "#d5d8dc",
           "gemm": "#a9dfbf", "attention": "#f9e79f", "conv": "#f5b7b1"}


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draws a PNG of what is saved as JSON. False where matplotlib, which is not among the requirements, is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    series, bars = figure.subplots(1, 2, width_ratios=[3, 2])
    for video in results["videos"]:
        times, block = video["block_series"], video["latents_of_block"]
        series.plot([index * block for index in range(len(times))], times, label=video["name"], linewidth=1)
    series.set(title=results["title"], xlabel="latent", ylabel="block, ms", ylim=(0, None))
    series.title.set_fontsize(9)
    series.grid(alpha=0.3)
    series.legend(fontsize=8)
    _stack(bars, "measured", _phases(results))
    if roofline := results.get("roofline"):
        ceilings = {stage: roofline["stages"][stage]["ceiling_ms"] for stage in BLOCK_STAGES
                    if stage in roofline["stages"]}
        _stack(bars, "roofline\nby phase", ceilings)
        _stack(bars, "roofline\nby kind", {kind: roofline["kinds"][kind]["ms"] for kind in KINDS
                                          if kind in roofline["kinds"]})
    bars.set(title="a steady block, ms")
    bars.margins(y=0.08)
    figure.savefig(path, dpi=110)
    return True


def _phases(results: dict[str, Any]) -> dict[str, float]:
    """ms of each phase of a block of the video that the roofline is held against, and what no phase accounts for."""
    video = next(video for video in results["videos"] if video["name"] == results["steady"])
    phases = {stage: video["stages"][stage] for stage in BLOCK_STAGES if stage in video["stages"]}
    return phases | {"rest": max(0.0, video["block"] - sum(phases.values()))}


def _stack(axes, label: str, parts: dict[str, float]) -> None:
    bottom, whole = 0.0, sum(parts.values())
    for name, height in parts.items():
        axes.bar(label, height, bottom=bottom, color=COLOURS[name], edgecolor="white")
        if height > 0.04 * whole:  # else its name would cover others
            axes.annotate(f"{name} {height:.3g}", (label, bottom + height / 2), ha="center", va="center", fontsize=8)
        bottom += height
    axes.annotate(f"{bottom:.4g}", (label, bottom), ha="center", va="bottom", fontsize=9)
