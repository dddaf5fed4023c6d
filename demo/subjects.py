"""The subjects: shapes of one colour, soft-shaded, with a shadow on the ground."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from demo.canvas import CENTRE, GROUND, Frames, grid, inside, over, rgb, smooth
from demo.scenery import LIGHTS

COLOURS = {
    "red": (0.87, 0.12, 0.12), "orange": (1.00, 0.50, 0.05), "yellow": (1.00, 0.86, 0.10), "green": (0.08, 0.62, 0.22),
    "blue": (0.10, 0.30, 0.90), "purple": (0.48, 0.16, 0.72), "pink": (1.00, 0.50, 0.74), "white": (0.95, 0.95, 0.95),
}
DARK = (0.10, 0.09, 0.12)
TINT = 0.3  # how much of the light's tint the subject takes


class Brush:
    """Puts parts of one subject on a patch. Coordinates u (right) and v (down) are in radii of the subject."""

    def __init__(self, u: Tensor, v: Tensor, pixel: Tensor, colour: Tensor):
        self.u, self.v, self.pixel, self.colour = u, v, pixel, colour
        self.cover = torch.zeros_like(u)
        self.image = colour.expand(-1, -1, *u.shape[1:])

    def add(self, distance: Tensor, colour: Tensor) -> None:
        """A part: `distance` in radii outside its edge, colour [N or 1, 3, 1, 1] or a whole picture."""
        cover = inside(distance * self.pixel)
        self.image = over(self.image, cover, colour)
        self.cover = torch.maximum(self.cover, cover)

    def shade(self, amount: float) -> Tensor:
        """The subject's colour, lighter (amount > 0) or darker."""
        target = rgb(1, 1, 1, like=self.u) if amount > 0 else rgb(*DARK, like=self.u)
        return torch.lerp(self.colour, target, abs(amount))

    def dark(self) -> Tensor:
        return rgb(*DARK, like=self.u)

    def circle(self, x: float, y: float, radius: float) -> Tensor:
        return ((self.u - x).square() + (self.v - y).square()).sqrt() - radius

    def ellipse(self, x: float, y: float, a: float, b: float) -> Tensor:
        return ((((self.u - x) / a).square() + ((self.v - y) / b).square()).sqrt() - 1) * min(a, b)

    def box(self, x: float, y: float, a: float, b: float, corner: float = 0.0) -> Tensor:
        dx, dy = (self.u - x).abs() - (a - corner), (self.v - y).abs() - (b - corner)
        outside = (dx.clamp(min=0).square() + dy.clamp(min=0).square()).sqrt()
        return outside + torch.maximum(dx, dy).clamp(max=0) - corner

    def polygon(self, *points: tuple[float, float]) -> Tensor:
        """A convex polygon, its corners in clockwise order (v points down)."""
        distance = None
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            side = ((self.u - x0) * (y1 - y0) - (self.v - y0) * (x1 - x0)) / length
            distance = side if distance is None else torch.maximum(distance, side)
        return distance


def ball(b: Brush) -> None:
    b.add(b.circle(0, 0, 0.95), b.colour)
    sector = torch.sin(3 * torch.atan2(b.v, b.u + 1e-6))
    b.add(torch.maximum(b.circle(0, 0, 0.95), -0.25 * sector), b.shade(0.55))
    b.add(b.circle(0, 0, 0.2), b.shade(-0.2))


def cube(b: Brush) -> None:
    b.add(b.polygon((-0.85, -0.5), (-0.5, -0.9), (0.9, -0.9), (0.5, -0.5)), b.shade(0.45))
    b.add(b.polygon((0.5, -0.5), (0.9, -0.9), (0.9, 0.45), (0.5, 0.85)), b.shade(-0.45))
    b.add(b.box(-0.175, 0.175, 0.675, 0.675, 0.05), b.colour)
    b.add(b.box(-0.175, 0.175, 0.4, 0.4, 0.05), b.shade(0.18))


def star(b: Brush) -> None:
    angle = torch.atan2(b.u, -b.v)
    point = torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    radius = (b.u.square() + b.v.square()).sqrt()
    x, y = radius * torch.cos(point), radius * torch.sin(point).abs()
    edge = 0.88 * ((x - 1.05) * 0.53 + y)  # the line from a point to the notch beside it
    b.add(edge, b.colour)
    b.add(edge + 0.28, b.shade(0.35))


def boat(b: Brush) -> None:
    b.add(b.polygon((-1.05, 0.3), (1.05, 0.3), (0.65, 0.85), (-0.65, 0.85)), b.colour)
    b.add(b.polygon((-1.05, 0.3), (1.05, 0.3), (0.98, 0.42), (-0.98, 0.42)), b.shade(-0.35))
    b.add(b.box(0.0, -0.35, 0.06, 0.68), b.dark())
    b.add(b.polygon((0.12, -0.98), (0.95, 0.14), (0.12, 0.14)), b.shade(0.25))
    b.add(b.polygon((-0.12, -0.8), (-0.12, 0.14), (-0.7, 0.14)), b.shade(0.55))


def balloon(b: Brush) -> None:
    string = 0.06 * torch.sin(9 * b.v)
    b.add(torch.maximum((b.u - string).abs() - 0.035, (b.v - 0.85).abs() - 0.35), b.dark())
    b.add(b.polygon((0.0, 0.42), (0.16, 0.62), (-0.16, 0.62)), b.shade(-0.25))
    b.add(b.ellipse(0, -0.25, 0.66, 0.78), b.colour)
    b.add(b.ellipse(-0.24, -0.52, 0.15, 0.24), b.shade(0.7))


def bird(b: Brush) -> None:
    b.add(b.polygon((-1.1, -0.18), (-0.45, -0.05), (-0.45, 0.3), (-1.05, 0.22)), b.shade(-0.35))
    b.add(b.polygon((0.78, -0.5), (1.1, -0.33), (0.78, -0.2)), rgb(1.0, 0.66, 0.1, like=b.u))
    b.add(b.ellipse(-0.05, 0.15, 0.72, 0.5), b.colour)
    b.add(b.circle(0.52, -0.36, 0.38), b.colour)
    b.add(b.ellipse(-0.2, 0.08, 0.45, 0.26), b.shade(-0.3))
    b.add(b.ellipse(0.1, 0.42, 0.4, 0.18), b.shade(0.45))
    b.add(b.circle(0.62, -0.42, 0.09), b.dark())


def fish(b: Brush) -> None:
    b.add(b.polygon((-0.5, 0.0), (-1.08, -0.5), (-0.92, 0.0)), b.shade(-0.25))
    b.add(b.polygon((-0.5, 0.0), (-0.92, 0.0), (-1.08, 0.5)), b.shade(-0.25))
    b.add(b.polygon((-0.25, -0.4), (0.1, -0.78), (0.4, -0.35)), b.shade(-0.25))
    b.add(b.ellipse(0.14, 0.0, 0.86, 0.52), b.colour)
    b.add(torch.maximum(b.ellipse(0.14, 0.0, 0.86, 0.52), (b.u + 0.1).abs() - 0.1), b.shade(0.6))
    b.add(torch.maximum(b.ellipse(0.14, 0.0, 0.86, 0.52), (b.u - 0.3).abs() - 0.08), b.shade(0.6))
    b.add(b.circle(0.66, -0.12, 0.15), rgb(1, 1, 1, like=b.u))
    b.add(b.circle(0.69, -0.12, 0.08), b.dark())


def car(b: Brush) -> None:
    b.add(b.polygon((-0.5, -0.55), (0.35, -0.55), (0.72, 0.0), (-0.78, 0.0)), b.shade(-0.2))
    b.add(b.polygon((-0.42, -0.44), (-0.08, -0.44), (-0.08, -0.06), (-0.6, -0.06)), rgb(0.75, 0.90, 1.0, like=b.u))
    b.add(b.polygon((0.04, -0.44), (0.3, -0.44), (0.55, -0.06), (0.04, -0.06)), rgb(0.75, 0.90, 1.0, like=b.u))
    b.add(b.box(0.0, 0.22, 1.08, 0.3, 0.14), b.colour)
    b.add(b.circle(0.98, 0.16, 0.1), rgb(1.0, 0.95, 0.7, like=b.u))
    for x in (-0.58, 0.58):
        b.add(b.circle(x, 0.5, 0.28), b.dark())
        b.add(b.circle(x, 0.5, 0.13), rgb(0.75, 0.75, 0.78, like=b.u))


SHAPES: dict[str, Callable[[Brush], None]] = {
    "ball": ball, "cube": cube, "star": star, "boat": boat, "balloon": balloon, "bird": bird, "fish": fish, "car": car,
}

APART = 46.0  # pixels of a second subject from the first


def paint(image: Tensor, frames: Frames) -> Tensor:
    """The subjects over the scenery, [N, 3, H, W]."""
    for copy in range(2):
        where = (frames.copies > copy).nonzero().flatten()
        if len(where) == len(frames):
            image = _paint_one(image, frames, copy)
        elif len(where):
            image[where] = _paint_one(image[where], frames[where], copy)
    return image


def _paint_one(image: Tensor, frames: Frames, copy: int) -> Tensor:
    x, y = grid(image.device)
    zoom = frames.zoom
    shift = 0.0
    if copy:  # away from the first, to the side where there is room
        shift = torch.where(frames.x > 0, -APART, APART) - 0.2 * frames.x
    centre_x = (CENTRE[0] + zoom * (frames.x + shift))[:, None, None]
    centre_y = (CENTRE[1] + zoom * (frames.y - CENTRE[1]))[:, None, None]
    radius = (zoom * frames.size)[:, None, None]

    ground = (CENTRE[1] + zoom * (GROUND - CENTRE[1]))[:, None, None]
    height = ((ground - centre_y - radius) / 50).clamp(0, 1)
    away = (((x - centre_x) / (0.95 * radius)).square() + ((y - ground) / (0.2 * radius)).square()).sqrt()
    image = over(image, 0.38 * (1 - 0.6 * height) * smooth(1.25 - away), rgb(0.05, 0.05, 0.10, like=image))

    squash = frames.squash[:, None, None]
    dx, dy = (x - centre_x) * (1 - squash * 0.8), (y - centre_y - squash * radius) / (1 - squash)
    cos, sin = frames.angle.cos()[:, None, None], frames.angle.sin()[:, None, None]
    u, v = (dx * cos + dy * sin) / radius, (dy * cos - dx * sin) / radius
    table = torch.tensor(list(COLOURS.values()), device=image.device)
    colour = (frames.shown["colour"] @ table)[..., None, None]
    total, painted = 0, 0
    for index, shape in enumerate(SHAPES.values()):
        weight = frames.shown["subject"][:, index]
        where = weight.nonzero().flatten()
        if not len(where):
            continue
        brush = Brush(u[where], v[where], radius[where], colour[where])
        shape(brush)
        cover = brush.cover * weight[where, None, None]
        if len(where) == len(frames):
            total, painted = total + cover, painted + cover[:, None] * brush.image
        else:
            if isinstance(total, int):
                total, painted = torch.zeros_like(u), torch.zeros_like(image)
            total = total.index_add(0, where, cover)
            painted = painted.index_add(0, where, cover[:, None] * brush.image)
    light = torch.tensor([ambient for _, _, ambient in LIGHTS.values()], device=image.device)
    tint = torch.lerp(torch.ones(3, device=image.device), frames.shown["light"] @ light, TINT)[..., None, None]
    soft = 1.08 - 0.30 * smooth((dx + dy) / (2.4 * radius) + 0.5)  # lit from the upper left
    picture = painted / total[:, None].clamp(min=1e-6) * tint * soft[:, None]
    return over(image, total, picture.clamp(0, 1))

