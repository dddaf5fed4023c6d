"""Loss curves of the stages, as PNG."""

import json
from pathlib import Path


def plot(folder: Path) -> None:
    """Draws FOLDER/curves/*.json, each into a PNG beside it. Needs matplotlib, which is not among the requirements."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no pictures of the loss curves", flush=True)
        return
    for file in sorted((folder / "curves").glob("*.json")):
        curve = json.loads(file.read_text("utf-8"))
        names = sorted({name for point in curve for name in point} - {"step"})
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name in names:
            points = [(point["step"], point[name]) for point in curve if name in point]
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(title=file.stem, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(file.with_suffix(".png"), dpi=110)
