"""What the painters share: the size of the picture, what they are told of each frame, and how layers are put on it."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

HEIGHT, WIDTH = 112, 192
CENTRE = (WIDTH / 2, 62.0)  # what the camera zooms in on
GROUND = 97.0  # row of the ground below the subject


@dataclass
class Frames:
    """N frames. All tensors have N entries; lengths are in pixels."""

    time: Tensor  # seconds of the clip's clock
    style: Tensor  # [N, STYLE] uniform random numbers of the clip
    shown: dict[str, Tensor]  # of each attribute, how much of each choice is to be seen [N, choices]
    x: Tensor  # the subject's centre, from the middle of the picture
    y: Tensor  # the same, from the top
    angle: Tensor  # radians, clockwise
    squash: Tensor  # 0: as it is, 0.2: a fifth less high
    size: Tensor  # the subject's radius
    travel: Tensor  # how far the camera has gone to the right
    zoom: Tensor
    copies: Tensor
    fine: Tensor  # how much narrower the scenery's things are, which move as they do

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, index) -> "Frames":
        def pick(value):
            return {k: v[index] for k, v in value.items()} if isinstance(value, dict) else value[index]

        return Frames(*(pick(getattr(self, field.name)) for field in fields(self)))


def smooth(u: Tensor) -> Tensor:
    """Smoothstep: 0 below 0, 1 above 1, level at both."""
    u = u.clamp(0, 1)
    return u * u * (3 - 2 * u)


def inside(distance: Tensor, softness: float = 0.75) -> Tensor:
    """Coverage of a pixel `distance` pixels outside an edge (negative: inside)."""
    return (0.5 - distance / (2 * softness)).clamp(0, 1)


def over(image: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    """`colour` [N, 3, H or 1, W or 1] over an image [N, 3, H, W] where cover [N, H, W] says."""
    return torch.lerp(image, colour.expand_as(image), cover[:, None].expand_as(image))


def grid(device) -> tuple[Tensor, Tensor]:
    """x [1, 1, W] and y [1, H, 1] of the pixels' centres."""
    x = torch.arange(WIDTH, device=device, dtype=torch.float32) + 0.5
    y = torch.arange(HEIGHT, device=device, dtype=torch.float32) + 0.5
    return x.view(1, 1, -1), y.view(1, -1, 1)


def rgb(*values: float, like: Tensor) -> Tensor:
    """A colour [1, 3, 1, 1]."""
    return torch.tensor(values, device=like.device, dtype=torch.float32).view(1, 3, 1, 1)


def fixed_random(cell: Tensor, seed: Tensor) -> Tensor:
    """A number in 0 … 1 that looks random and is always the same for the same cell and seed."""
    value = torch.sin(cell * 12.9898 + seed * 78.233) * 43758.547
    return value - value.floor()
