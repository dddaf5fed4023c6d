"""What the live page's frames cost on the way as JPEG, as WebP and as fragmented H.264.

Blocks of 12 frames come 0.75 s apart, as the model makes them, and each is encoded at once. The three are compared at
about the same PSNR, that of the server's JPEGs. Reported for each:

- Mbit/s at 16 frames/s
- milliseconds from a block's being there to its first and to its last frame's being encoded
- with --chromium, milliseconds from a block's being encoded to its first frame's being on the screen there, and how
  many frames of a block have to wait for the next one

The frames are those of a video of yours, or of the toy world, enlarged and with a moving texture where that is larger.
"""

import argparse
import base64
import io
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.world import Script, draw, sample, scene_of
from live.packets import QUALITY
from utils.video import find_ffmpeg

FPS, BLOCK, BLOCKS = 16, 12, 8
SECONDS = BLOCK / FPS
TEXTURE = 6.0  # standard deviation, of 255
WEBP = (60, 70, 75, 80, 85, 90, 93, 96)  # qualities
CRF = (12, 15, 18, 20, 22, 24, 26, 28)
H264 = ["-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-pix_fmt", "yuv420p", "-g", "100000",
        "-movflags", "+frag_every_frame+empty_moov+default_base_moof", "-flush_packets", "1", "-f", "mp4"]
ON_SCREEN = """async ({ kind, blocks, every }) => {
  const bytes = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const first = [], held = [];
  if (kind !== "h264") {
    const context = document.body.appendChild(document.createElement("canvas")).getContext("2d");
    for (const block of blocks) {
      const began = performance.now();
      context.drawImage(await createImageBitmap(new Blob([bytes(block[0])], { type: `image/${kind}` })), 0, 0);
      await new Promise(requestAnimationFrame);
      first.push(performance.now() - began);
      held.push(0);
      await pause(100);
    }
    return { first, held };
  }
  const video = Object.assign(document.createElement("video"), { muted: true });
  document.body.append(video);
  const source = new MediaSource();
  video.src = URL.createObjectURL(source);
  await new Promise((done) => source.addEventListener("sourceopen", done, { once: true }));
  const buffer = source.addSourceBuffer('video/mp4; codecs="avc1.64001f"');
  const shown = [];  // [frame, when]
  const note = (now, about) => {
    shown.push([Math.round(about.mediaTime * 16), performance.now()]);
    video.requestVideoFrameCallback(note);
  };
  video.requestVideoFrameCallback(note);
  const began = [];
  for (const block of blocks) {
    const start = performance.now();
    began.push(start);
    buffer.appendBuffer(bytes(block[0]));
    await new Promise((done) => buffer.addEventListener("updateend", done, { once: true }));
    video.play().catch(() => {});
    await pause(every - (performance.now() - start));
  }
  began.forEach((start, i) => {
    const after = shown.find(([frame, when]) => when >= start && frame >= 12 * i);
    if (i > 0 && after) first.push(after[1] - start);
    const before = shown.filter(([, when]) => when < (began[i + 1] ?? Infinity));
    if (began[i + 1] && before.length) held.push(12 * (i + 1) - 1 - Math.max(...before.map(([frame]) => frame)));
  });
  return { first, held };
}"""


def toy_frames(height: int, width: int) -> np.ndarray:
    """Frames of the toy world, uint8 [T, H, W, 3]; where that is larger than its own, enlarged and with a texture that
    moves over it."""
    scenes = sample(1, 3, torch.Generator().manual_seed(3))
    count = BLOCK * BLOCKS
    script = Script.of([[scene_of(one) for one in scenes[0]]], [[0.0, count / FPS / 3, 2 * count / FPS / 3]])
    frames = draw(script, count)[0].float()
    if frames.shape[-2:] != (height, width):
        frames = torch.nn.functional.interpolate(frames, (height, width), mode="bicubic")
        texture = torch.randn(1, 1, height + 2, width + count + 2, generator=torch.Generator().manual_seed(0))
        texture = torch.nn.functional.avg_pool2d(texture, 3, stride=1)[0] * 3 * TEXTURE
        frames += torch.stack([texture[..., i:i + width] for i in range(count)])  # a pixel a frame
    return frames.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def video_frames(path: str, height: int, width: int) -> np.ndarray:
    """The first frames of a video, uint8 [T, H, W, 3]."""
    command = [find_ffmpeg(), "-loglevel", "error", "-i", path, "-frames:v", str(BLOCK * BLOCKS), "-vf",
               f"fps={FPS},scale={width}:{height}", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two videos, dB."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float32) - b) ** 2)))


def still(frame: np.ndarray, kind: str, quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, kind, quality=quality, **({"method": 2} if kind == "WEBP" else {}))
    return out.getvalue()


def as_stills(frames: np.ndarray, kind: str, quality: int) -> dict:
    """Each frame by itself."""
    blocks, first, last = [], [], []
    for start in range(0, len(frames), BLOCK):
        began = time.perf_counter()
        block = []
        for frame in frames[start:start + BLOCK]:
            block.append(still(frame, kind, quality))
            if len(block) == 1:
                first.append(time.perf_counter() - began)
        last.append(time.perf_counter() - began)
        blocks.append(block)
    back = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for block in blocks for one in block])
    return {"psnr": psnr(frames, back), "bytes": sum(len(one) for block in blocks for one in block),
            "first": first, "last": last, "blocks": blocks}


def as_h264(frames: np.ndarray, crf: int, every: float) -> dict:
    """Through one ffmpeg, a fragment a frame; blocks are given to it `every` seconds apart."""
    height, width = frames.shape[1:3]
    process = subprocess.Popen(
        [find_ffmpeg(), "-loglevel", "error", "-f", "rawvideo", "-pix_fmt",
         "rgb24", "-s", f"{width}x{height}", "-r", str(FPS), "-i", "-", *H264[:-2], "-crf", str(crf), *H264[-2:], "-"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    chunks: list[tuple[float, bytes]] = []

    def read() -> None:
        while data := os.read(process.stdout.fileno(), 1 << 20):
            chunks.append((time.perf_counter(), data))

    reader = threading.Thread(target=read)
    reader.start()
    given = []
    for start in range(0, len(frames), BLOCK):
        given.append(time.perf_counter())
        process.stdin.write(frames[start:start + BLOCK].tobytes())
        process.stdin.flush()
        time.sleep(max(0.0, given[-1] + every - time.perf_counter()))
    process.stdin.close()
    process.wait()
    reader.join()
    whole = b"".join(data for _, data in chunks)
    ends = _frame_ends(whole, chunks)
    stops = [*given[1:], math.inf]
    blocks = [[b"".join(data for when, data in chunks if start <= when < stop)]
              for start, stop in zip([0.0, *given[1:]], stops, strict=True)]
    return {"psnr": psnr(frames, decode(whole, frames.shape)), "bytes": len(whole),
            "first": [ends[BLOCK * i] - start for i, start in enumerate(given)][1:],  # without the encoder's start
            "last": [ends[BLOCK * (i + 1) - 1] - start for i, start in enumerate(given)][1:-1], "blocks": blocks}


def _frame_ends(whole: bytes, chunks: list[tuple[float, bytes]]) -> list[float]:
    """When the last byte of each frame's fragment came."""
    times, place, end, ends = [], 0, 0, []
    for when, data in chunks:
        end += len(data)
        times.append((end, when))
    while place + 8 <= len(whole):
        place_of, kind = place, whole[place + 4:place + 8]
        place += int.from_bytes(whole[place_of:place_of + 4], "big")
        if kind == b"mdat":
            ends.append(next(when for end, when in times if end >= place))
    return ends


def decode(mp4: bytes, shape: tuple[int, ...]) -> np.ndarray:
    done = subprocess.run([find_ffmpeg(), "-loglevel", "error", "-f", "mp4", "-i", "-", "-fps_mode", "passthrough",
                           "-pix_fmt", "rgb24", "-f", "rawvideo", "-"], input=mp4, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(shape)


def nearest(wanted: float, settings: tuple[int, ...], encode: Callable[[int], dict]) -> tuple[int, dict]:
    """The setting whose PSNR is nearest, and what it gave."""
    tried = {setting: encode(setting) for setting in settings}
    best = min(tried, key=lambda setting: abs(tried[setting]["psnr"] - wanted))
    return best, tried[best]


def on_screen(chromium: str, kind: str, blocks: list[list[bytes]]) -> dict:
    """What headless Chromium says of the blocks; see ON_SCREEN."""
    from playwright.sync_api import sync_playwright

    given = [[base64.b64encode(one).decode() for one in block[:1]] for block in blocks]
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        result = browser.new_page().evaluate(ON_SCREEN, {"kind": kind, "blocks": given, "every": 1000 * SECONDS})
        browser.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["112x192", "480x832"], metavar="HxW")
    parser.add_argument("--video", help="take its frames, not the toy world's")
    parser.add_argument("--chromium", metavar="PATH", help="measure in this browser too; needs playwright")
    args = parser.parse_args()
    for size in args.sizes:
        height, width = map(int, size.split("x"))
        frames = video_frames(args.video, height, width) if args.video else toy_frames(height, width)
        made = {f"JPEG {QUALITY}": as_stills(frames, "JPEG", QUALITY)}
        wanted = made[f"JPEG {QUALITY}"]["psnr"]
        quality, webp = nearest(wanted, WEBP, lambda quality, f=frames: as_stills(f, "WEBP", quality))
        crf, _ = nearest(wanted, CRF, lambda crf, f=frames: as_h264(f, crf, 0.05))
        made |= {f"WebP {quality}": webp, f"H.264 crf {crf}": as_h264(frames, crf, SECONDS)}
        print(f"{size}       PSNR   Mbit/s   first frame, ms   last frame, ms   on the screen, ms   held back")
        for name, one in made.items():
            seen = {"first": [], "held": []}
            if args.chromium:
                kind = name.split()[0].lower().replace(".", "")
                seen = on_screen(args.chromium, kind, one["blocks"])
            told = [f"{statistics.median(values):.0f}" if values else "-" for values in seen.values()]
            print(f"{name:14}{one['psnr']:.1f}   {8e-6 * FPS * one['bytes'] / len(frames):<9.2f}"
                  f"{1000 * statistics.median(one['first']):<18.1f}{1000 * statistics.median(one['last']):<17.1f}"
                  f"{told[0]:<20}{told[1]}", flush=True)


if __name__ == "__main__":
    main()
