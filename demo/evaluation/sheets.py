"""Pictures of the films: contact sheets, and one story as an animated picture."""

import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.canvas import HEIGHT, WIDTH
from demo.videos import read_video
from demo.world import FPS
from utils.video import find_ffmpeg

TEXT, GAP, LINE = 12, 4, 15  # pixels: size of letters, between pictures, of a line
LARGEST = 3_000_000  # bytes of the animated picture
QUALITIES = ((2, 55), (2, 35), (3, 35), (3, 20), (4, 15))  # every how many frames, and quality, tried in this order


def _write(canvas: Image.Image, x: int, y: int, text: str, columns: int, lines: int) -> None:
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for number, line in enumerate(textwrap.wrap(text, columns)[:lines]):
        draw.text((x, y + number * LINE), line, fill=(20, 20, 20), font=font)


def sheet(rows: Sequence[Sequence[np.ndarray]], headings: Sequence[str], captions: Sequence[Sequence[str]],
          path: Path) -> None:
    """A contact sheet: `rows` of pictures [H, W, 3], `headings` above the columns, and below each row its captions:
    one over the whole width, or one for each picture."""
    columns = len(headings)
    lines = 4 if any(len(texts) > 1 for texts in captions) else 1 if columns > 4 else 2
    below = lines * LINE + 2 * GAP
    canvas = Image.new("RGB", (columns * (WIDTH + GAP) + GAP, LINE + GAP + len(rows) * (HEIGHT + below)), "white")
    for column, heading in enumerate(headings):
        _write(canvas, GAP + column * (WIDTH + GAP), GAP // 2, heading, 30, 1)
    for number, (pictures, texts) in enumerate(zip(rows, captions, strict=True)):
        y = LINE + GAP + number * (HEIGHT + below)
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (GAP + column * (WIDTH + GAP), y))
        for column, text in enumerate(texts):
            wide = columns * 31 if len(texts) == 1 else 31
            _write(canvas, GAP + column * (WIDTH + GAP), y + HEIGHT + GAP // 2, text, wide, lines)
    canvas.save(path, optimize=True)


def prompt_sheet(rows: Sequence[dict], folder: Path, path: Path, count: int = 8) -> None:
    """Rows: `count` films of one prompt each, evenly chosen. Columns: moments."""
    chosen = [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
    longest = chosen[0]["frames"]
    ends = [round(t * FPS) for t in (1, 5, 30, 60, 120, 240) if t * FPS <= longest] or [longest]
    pictures = [[_frame(folder / f"{row['name']}.mp4", end - 1) for end in ends] for row in chosen]
    sheet(pictures, [f"{end / FPS:g} s" for end in ends], [row["captions"] for row in chosen], path)


def timeline_sheet(rows: Sequence[dict], folder: Path, path: Path, count: int = 6) -> None:
    """Rows: `count` timelines, evenly chosen. Columns: their scenes, each 4 s after it begins."""
    chosen = [rows[i * len(rows) // min(count, len(rows))] for i in range(min(count, len(rows)))]
    starts = chosen[0]["starts"]
    moments = [min(start + 4 * FPS, end) - 1 for start, end in zip(starts, [*starts[1:], chosen[0]["frames"]],
                                                                   strict=True)]
    pictures = [[_frame(folder / f"{row['name']}.mp4", moment) for moment in moments] for row in chosen]
    sheet(pictures, [f"{(moment + 1) / FPS:.1f} s" for moment in moments], [row["captions"] for row in chosen], path)


def _frame(path: Path, index: int) -> np.ndarray:
    return read_video(path, index, 1)[0]


def animation(row: dict, folder: Path, path: Path) -> None:
    """One timeline with its captions below, as an animated WebP of at most LARGEST bytes that runs for ever.

    Raises ValueError where ffmpeg can't make it.
    """
    video = read_video(folder / f"{row['name']}.mp4")
    below = 2 * LINE + 2 * GAP
    strips = []
    for text in row["captions"]:
        strip = Image.new("RGB", (2 * WIDTH, below), "white")
        _write(strip, GAP, GAP // 2, text, 62, 2)
        strips.append(np.asarray(strip))
    for every, quality in QUALITIES:
        frames = []
        for index in range(0, len(video), every):
            scene = sum(start <= index for start in row["starts"]) - 1
            picture = video[index].repeat(2, 0).repeat(2, 1)
            frames.append(np.concatenate([picture, strips[scene]]))
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{2 * WIDTH}x{2 * HEIGHT + below}",
                  "-r", str(FPS / every), "-i", "-"]
        command = [find_ffmpeg(), "-y", "-loglevel", "error", *source, "-c:v", "libwebp_anim", "-quality", str(quality),
                   "-compression_level", "4", "-loop", "0", str(path)]
        done = subprocess.run(command, input=np.stack(frames).tobytes(), capture_output=True, check=False)
        if done.returncode != 0:
            raise ValueError(f"{path}: {done.stderr.decode(errors='replace').strip()}")
        if path.stat().st_size <= LARGEST:
            return
