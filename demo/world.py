"""The toy world: short clips of one subject in a setting, drawn from their description alone.

A scene has six attributes. A script is a few scenes in a row; where one follows another the world goes on without a
cut: the subject stays where it is, colour and light blend in half a second, the setting cross-fades in one, motion and
camera ease over. So what a clip shows at any moment is known, also while it changes.

Everything is closed-form in time and vectorised over clips and frames, on any device.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from demo import scenery, subjects
from demo.canvas import CENTRE, HEIGHT, WIDTH, Frames, smooth

FPS = 16


@dataclass(frozen=True)
class Scene:
    """What is to be seen; each attribute is one of `CHOICES`."""

    subject: str
    colour: str
    motion: str
    setting: str
    light: str
    camera: str


CHOICES: dict[str, tuple[str, ...]] = {
    "subject": tuple(subjects.SHAPES),
    "colour": tuple(subjects.COLOURS),
    "motion": ("drift left", "drift right", "bounce", "circle", "rise", "sink", "spin", "sway", "still"),
    "setting": tuple(scenery.SETTINGS),
    "light": tuple(scenery.LIGHTS),
    "camera": ("still", "pan", "zoom"),
}
CATEGORIES = tuple(field.name for field in fields(Scene))

BLEND = {"subject": 0.5, "colour": 0.5, "motion": 0.7, "setting": 1.0, "light": 0.5, "camera": 0.7}  # seconds

DRIFT_SPEED = 30.0  # pixels a second that the nearest scenery goes by
PAN, PAN_PERIOD = 28.0, 5.0  # pixels, seconds
ZOOM, ZOOM_PERIOD = 0.32, 5.0  # the subject gets so much larger
STRAY_PERIOD = 6.5  # seconds

STYLE = 24  # random numbers of a clip that no caption tells: where the subject is, how the hills lie, …


@dataclass
class Script:
    """Scenes over time of B clips.

    scenes: int64 [B, K, 6], each attribute's index in `CHOICES`. starts: seconds [B, K]; the first scene is there from
    the start. style: uniform random numbers [B, STYLE]. copies: how many subjects there are, int64 [B]; 1 but where
    someone wants to learn to count.
    """

    scenes: Tensor
    starts: Tensor
    style: Tensor
    copies: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def to(self, device) -> "Script":
        return Script(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __getitem__(self, index) -> "Script":
        return Script(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def of(scenes: list[list[Scene]], starts: list[list[float]], seed: int = 0) -> "Script":
        """One clip for each list of scenes; all lists are of the same length."""
        indices = [[[CHOICES[name].index(getattr(scene, name)) for name in CATEGORIES] for scene in clip]
                   for clip in scenes]
        style = torch.rand(len(scenes), STYLE, generator=torch.Generator().manual_seed(seed))
        return Script(torch.tensor(indices), torch.tensor(starts), style, torch.ones(len(scenes), dtype=torch.int64))


def scene_of(indices) -> Scene:
    """The scene of six indices."""
    return Scene(*(CHOICES[name][int(i)] for name, i in zip(CATEGORIES, indices, strict=True)))


HELD_OUT = 7  # one in so many combinations of subject, colour and setting is kept out of training


def is_held_out(scenes: Tensor) -> Tensor:
    """Whether the (subject, colour, setting) of scenes [..., 6] is kept out of all training; one in seven is."""
    subject, colour, setting = scenes[..., 0], scenes[..., 1], scenes[..., 3]
    return (subject + 3 * colour + 2 * setting) % HELD_OUT == 0


def sample(clips: int, scenes: int, generator: torch.Generator, held_out: bool = False,
           first: Tensor | None = None) -> Tensor:
    """Random scenes [clips, scenes, 6] of the combinations that are trained on, or of those that are held out.

    From one scene to the next one to three attributes change. first: the first scenes [clips, 6], where they are given.
    """
    counts = torch.tensor([len(CHOICES[name]) for name in CATEGORIES])

    def draw(n: int) -> Tensor:
        return (torch.rand(n, len(counts), generator=generator) * counts).long()

    result = [] if first is None else [first]
    for k in range(len(result), scenes):
        scene = draw(clips)
        pending = torch.ones(clips, dtype=torch.bool)
        while pending.any():
            fresh = draw(clips)
            if k > 0:  # keeps all but one to three attributes of the scene before
                rank = torch.rand(clips, len(counts), generator=generator).argsort(1).argsort(1)
                changes = rank < torch.randint(1, 4, (clips, 1), generator=generator)
                fresh = torch.where(changes, fresh, result[-1])
            scene = torch.where(pending[:, None], fresh, scene)
            pending &= is_held_out(scene) != held_out
            if k > 0:
                pending |= (scene == result[-1]).all(1)
        result.append(scene)
    return torch.stack(result, 1)


@dataclass
class Manner:
    """How clips keep to what their scenes say, as factors [B] of what the world does: its tempo, how far the camera
    moves, how much a drifting subject bobs and leans; pixels by which every subject bobs, whatever its motion, and
    slowly strays to the left and to the right; and how much narrower all is that the scenery is made of."""

    tempo: Tensor
    camera: Tensor
    bob: Tensor
    wobble: Tensor
    stray: Tensor
    fine: Tensor

    @staticmethod
    def exact(clips: int, device) -> "Manner":
        """The world's own."""
        one = torch.ones(clips, device=device)
        return Manner(one, one, one, 0 * one, 0 * one, one)


def weights(values: Tensor, starts: Tensor, t: Tensor, choices: int, seconds: float) -> Tensor:
    """How much of each choice is to be seen. values and starts [B, K], t [B, T] seconds → [B, T, choices], sum 1."""
    ramps = smooth((t[..., None] - starts[:, None]) / seconds)  # [B, T, K]
    ramps[..., 0] = 1
    left = torch.ones_like(ramps[..., 0])
    result = t.new_zeros(*t.shape, choices)
    for k in reversed(range(values.shape[1])):
        share = (left * ramps[..., k])[..., None]
        result.scatter_add_(2, values[:, k, None, None].expand(*t.shape, 1), share)
        left = left * (1 - ramps[..., k])
    return result


def frames_of(script: Script, frames: int, manner: Manner | None = None) -> Frames:
    """What the painters need to know of each frame of clips that begin at 0 s."""
    device = script.scenes.device
    clips = len(script)
    manner = manner or Manner.exact(clips, device)
    second = manner.tempo[:, None] / FPS  # of the world's time, that a frame takes
    t = torch.arange(frames, device=device) * second
    shown = {name: weights(script.scenes[..., i], script.starts, t, len(CHOICES[name]), BLEND[name])
             for i, name in enumerate(CATEGORIES)}
    style = script.style[:, None].expand(-1, frames, -1)
    clock = t + 20 * style[..., 0]  # motions are somewhere in their period when a clip begins

    x, y, tilt_x, tilt_y, squash = _motion(shown["motion"], clock, manner.bob[:, None])
    y = y + manner.wobble[:, None] * _bob(clock + style[..., 3])
    x = x + manner.stray[:, None] * torch.sin(2 * math.pi * (clock / STRAY_PERIOD + style[..., 3]))
    velocity = (shown["motion"][..., 1] - shown["motion"][..., 0]) * DRIFT_SPEED
    scroll = (velocity.cumsum(1) - velocity) * second
    pan, zoom = shown["camera"][..., 1:].unbind(-1)
    pan = pan * manner.camera[:, None] * PAN * torch.sin(2 * math.pi * clock / PAN_PERIOD)
    zoom = 1 + zoom * manner.camera[:, None] * ZOOM * (0.5 - 0.5 * torch.cos(2 * math.pi * clock / ZOOM_PERIOD))
    anchor_x, anchor_y = 36 * (style[..., 1] - 0.5), 58 + 10 * (style[..., 2] - 0.5)
    size = 19 + 3 * style[..., 3]

    def flat(value: Tensor) -> Tensor:
        return value.flatten(0, 1)

    return Frames(
        time=flat(clock), style=flat(style), shown={name: flat(value) for name, value in shown.items()},
        x=flat(anchor_x + x - pan), y=flat(anchor_y + y), angle=flat(torch.atan2(tilt_y, tilt_x)),
        squash=flat(squash), size=flat(size), travel=flat(scroll + pan), zoom=flat(zoom),
        copies=flat(script.copies[:, None].expand(-1, frames)), fine=flat(manner.fine[:, None].expand(-1, frames)),
    )


def subject_cover(script: Script, frames: int, cell: int) -> Tensor:
    """How much of each cell of `cell` × `cell` pixels is near the subject, 0 … 1: [B, frames, H / cell, W / cell]."""
    every = frames_of(script, frames)
    device = script.scenes.device
    y = (torch.arange(HEIGHT // cell, device=device) + 0.5)[:, None] * cell
    x = (torch.arange(WIDTH // cell, device=device) + 0.5) * cell
    zoom, there = every.zoom[:, None, None], (every.copies > 0)[:, None, None]
    dx = x - CENTRE[0] - zoom * every.x[:, None, None]
    dy = y - CENTRE[1] - zoom * (every.y[:, None, None] - CENTRE[1])
    away = (dx.square() + dy.square()).sqrt() - 1.15 * zoom * every.size[:, None, None]
    return (smooth(0.5 - away / cell) * there).unflatten(0, (len(script), frames))


def scenery_speed(script: Script, frames: int) -> Tensor:
    """How fast the scenery goes by in each frame, as a share of how fast it drifts, 0 … 1: [B, frames]."""
    every = frames_of(script, frames + 1)
    travel, zoom = (value.unflatten(0, (len(script), -1)).diff(dim=1).abs() for value in (every.travel, every.zoom))
    return ((travel + WIDTH / 4 * zoom) * FPS / DRIFT_SPEED).clamp(max=1)  # a zoom moves what is at a quarter of it


def _motion(weight: Tensor, t: Tensor, bob: Tensor) -> tuple[Tensor, ...]:
    """Offset in pixels, direction of the upright as a vector, and squash of the subject at clock t [B, T]. bob [B, 1]:
    as in a Manner."""
    turn = 2 * math.pi * t
    zero = torch.zeros_like(t)
    hop = torch.sin(math.pi * t / 0.9).abs()
    rise = _saw(t / 2.4)
    swing = torch.sin(turn / 2.2)
    #           x                          y                     angle             squash
    motions = [(zero - 10 * bob,           2 * bob * _bob(t),    zero - 0.1 * bob, zero),
               (zero + 10 * bob,           2 * bob * _bob(t),    zero + 0.1 * bob, zero),
               (zero,                      20 - 44 * hop,        zero,             0.22 * smooth(1 - 5 * hop)),
               (20 * torch.cos(turn / 2.6), 20 * torch.sin(turn / 2.6), zero,      zero),
               (zero,                      20 - 40 * rise,       zero,             zero),
               (zero,                      40 * rise - 20,       zero,             zero),
               (zero,                      zero,                 turn / 2.0,       zero),
               (24 * swing,                -4 * swing.abs(),     0.35 * swing,     zero),
               (zero,                      zero,                 zero,             zero)]
    x, y, angle, squash = (torch.stack(column, -1) for column in zip(*motions, strict=True))
    return ((weight * x).sum(-1), (weight * y).sum(-1), (weight * angle.cos()).sum(-1), (weight * angle.sin()).sum(-1),
            (weight * squash).sum(-1))


def _bob(t: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * t / 1.8)


def _saw(u: Tensor) -> Tensor:
    """0 … 1 slowly in four fifths of a period, and back in the last one; eased at both ends."""
    u = u % 1
    return torch.where(u < 0.8, smooth(u / 0.8), smooth((1 - u) / 0.2))


def paint(frames: Frames) -> Tensor:
    """Frames as RGB [N, 3, H, W] in 0 … 1."""
    image = scenery.paint(frames)
    image = subjects.paint(image, frames)
    return scenery.paint_weather(image, frames)


def draw(script: Script, frames: int, batch: int = 1024, manner: Manner | None = None) -> Tensor:
    """Clips as uint8 [B, frames, 3, HEIGHT, WIDTH]. `batch` frames at a time are painted."""
    every = frames_of(script, frames, manner)
    parts = [(255 * paint(every[i:i + batch]).clamp(0, 1)).round().to(torch.uint8)
             for i in range(0, len(every), batch)]
    return torch.cat(parts).view(len(script), frames, 3, HEIGHT, WIDTH)
