"""Settings, light and weather: everything of a frame but the subject."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from demo.canvas import CENTRE, HEIGHT, WIDTH, Frames, fixed_random, grid, inside, over, rgb, smooth

PERIOD = 384  # pixels after which hills repeat

#          sky above          sky at the horizon  what it does to colours
LIGHTS = {
    "noon":     ((0.30, 0.58, 0.95), (0.80, 0.92, 1.00), (1.00, 1.00, 1.00)),
    "sunset":   ((0.36, 0.25, 0.58), (1.00, 0.60, 0.32), (1.00, 0.70, 0.56)),
    "night":    ((0.02, 0.04, 0.16), (0.12, 0.17, 0.38), (0.32, 0.38, 0.64)),
    "snowfall": ((0.66, 0.71, 0.79), (0.87, 0.90, 0.94), (0.84, 0.88, 0.96)),
    "rain":     ((0.27, 0.32, 0.39), (0.50, 0.56, 0.62), (0.55, 0.62, 0.70)),
}  # fmt: skip
NOON, SUNSET, NIGHT, SNOWFALL, RAIN = range(len(LIGHTS))


class View:
    """The frames that show one setting, as its painter sees them."""

    def __init__(self, frames: Frames):
        self.frames = frames
        self.x, self.y = grid(frames.time.device)
        light = torch.tensor(list(LIGHTS.values()), device=frames.time.device)  # [lights, 3, 3]
        top, bottom, ambient = torch.einsum("nl,lsc->snc", frames.shown["light"], light)[..., None, None]
        self.haze, self.ambient = bottom, ambient
        self.night = frames.shown["light"][:, NIGHT, None, None, None]
        self.sky = torch.lerp(top, bottom, smooth(self.y / 74)[:, None]).expand(-1, -1, -1, WIDTH)

    def style(self, index: int) -> Tensor:
        return self.frames.style[:, index, None, None]

    @property
    def time(self) -> Tensor:
        return self.frames.time[:, None, None]

    def at(self, depth: float) -> tuple[Tensor, Tensor]:
        """World coordinates x [N, 1, W], y [N, H, 1] of the pixels at a depth: 0 infinitely far, 1 the subject's."""
        zoom = (1 + (self.frames.zoom - 1) * depth)[:, None, None]
        x = (self.x - CENTRE[0]) / zoom + depth * self.frames.travel[:, None, None] + 1000
        return x * self.frames.fine[:, None, None], (self.y - CENTRE[1]) / zoom + CENTRE[1]

    def lit(self, *colour: float) -> Tensor:
        return rgb(*colour, like=self.sky) * self.ambient

    def far(self, *colour: float, haze: float) -> Tensor:
        """A colour seen through much air."""
        return torch.lerp(self.lit(*colour), self.haze, haze)


def ridge(x: Tensor, phase: Tensor, heights: tuple[float, ...]) -> Tensor:
    """Hills: waves of 2, 3, 5, … to a period, so high each."""
    total = torch.zeros_like(x)
    for k, height in zip((2, 3, 5, 9)[:len(heights)], heights, strict=True):
        total = total + height * torch.sin(2 * math.pi * (k * x / PERIOD + phase * (k + 1)))
    return total


def cells(x: Tensor, width: float, seed: Tensor, loose: float = 0.3) -> tuple[Tensor, Tensor]:
    """The number of the cell that x is in, and the distance from its middle, which is off by `loose` of a cell."""
    number = torch.floor(x / width)
    away = x - (number + 0.5) * width
    number = torch.remainder(number, 64)
    return number, away - loose * width * (fixed_random(number, seed) - 0.5)


def meadow(view: View) -> Tensor:
    image = view.sky
    x, y = view.at(0.2)
    image = over(image, inside(60 + ridge(x, view.style(4), (4, 3)) - y), view.far(0.36, 0.55, 0.50, haze=0.5))
    x, y = view.at(0.5)
    hill = 71 + ridge(x, view.style(5), (4, 3))
    number, away = cells(x, 64, view.style(6))
    top = hill - 8 - 5 * fixed_random(number, view.style(7))
    image = over(image, inside(away.abs() - 1.2) * inside(top - y) * inside(y - hill), view.lit(0.36, 0.25, 0.16))
    image = over(image, inside(((away / 8) ** 2 + ((y - top) / 7) ** 2).sqrt() * 7 - 7), view.lit(0.18, 0.44, 0.20))
    image = over(image, inside(hill - y), view.far(0.34, 0.62, 0.27, haze=0.08))
    x, y = view.at(1.0)
    ground = 86 + ridge(x, view.style(8), (2, 1.5))
    depth = ((y - ground) / 28).clamp(0, 1)[:, None]
    image = over(image, inside(ground - y), torch.lerp(view.lit(0.45, 0.76, 0.30), view.lit(0.22, 0.54, 0.18), depth))
    for row in range(3):
        number, away = cells(x + 7 * row, 21, view.style(9) + row)
        flower = ((away / 1.0) ** 2 + (y - (92 + 7 * row) - 3 * fixed_random(number, view.style(10))) ** 2).sqrt()
        yellow = (fixed_random(number, view.style(11) + row) > 0.5).float()[:, None]
        image = over(image, inside(flower - 1.6), torch.lerp(view.lit(1, 1, 1), view.lit(1.0, 0.86, 0.2), yellow))
    return image


def sea(view: View) -> Tensor:
    image = view.sky
    x, y = view.at(0.15)
    island = 67 - (ridge(x, view.style(4), (5, 4)) - 2).clamp(min=0)
    image = over(image, inside(island - y), view.far(0.30, 0.42, 0.42, haze=0.45))
    depth = ((view.y - 66) / 46).clamp(0, 1)[:, None]
    water = torch.lerp(torch.lerp(view.lit(0.16, 0.55, 0.72), view.haze, 0.35), view.lit(0.03, 0.24, 0.48), depth)
    image = over(image, inside(66 - view.y).expand(len(view.frames), -1, WIDTH), water)
    for row, (height, far) in enumerate(((70, 0.35), (77, 0.5), (86, 0.75), (97, 1.0), (107, 1.2))):
        x, y = view.at(far)
        phase = view.style(5 + row)
        wave = height + 1.6 * far * torch.sin(2 * math.pi * (x / 48 + phase + view.time / 3))
        crest = smooth(torch.sin(2 * math.pi * (x / (64 * far + 20) + 3 * phase - view.time / 5)) * 0.9)
        image = over(image, 0.65 * crest * inside((y - wave).abs() - 0.9 * far), view.lit(0.85, 0.96, 1.0))
    return image


def desert(view: View) -> Tensor:
    image = view.sky
    x, y = view.at(0.2)
    mesa = 66 - 12 * smooth(2.5 * ridge(x, view.style(4), (0.6, 0.5)))
    image = over(image, inside(mesa - y), view.far(0.72, 0.40, 0.28, haze=0.3))
    x, y = view.at(0.5)
    dune = 73 + ridge(x, view.style(5), (5, 2))
    number, away = cells(x, 76, view.style(6))
    top = dune - 15 - 4 * fixed_random(number, view.style(7))
    stem = (away.square() + (y - torch.maximum(torch.minimum(y, dune + 2), top)).square()).sqrt() - 2.4
    arm_y = top + 6
    arm = torch.minimum(((away - 3).clamp(min=0, max=3) - away + 3).abs() + (y - arm_y - 2).abs() - 1.6,
                        (away - 6).abs() + (y - arm_y).abs() * 0.7 - 2.2)
    image = over(image, inside(torch.minimum(stem, arm)), view.lit(0.22, 0.48, 0.26))
    image = over(image, inside(dune - y), view.far(0.90, 0.68, 0.38, haze=0.05))
    x, y = view.at(1.0)
    ground = 87 + ridge(x, view.style(8), (3, 2))
    depth = ((y - ground) / 26).clamp(0, 1)[:, None]
    image = over(image, inside(ground - y), torch.lerp(view.lit(0.99, 0.84, 0.55), view.lit(0.84, 0.58, 0.30), depth))
    ripple = torch.sin(2 * math.pi * ((y - ground) / 6 + ridge(x, view.style(9), (0.25, 0.1))))
    return over(image, 0.16 * smooth(ripple) * inside(ground + 3 - y), view.lit(0.62, 0.40, 0.20))


def snow(view: View) -> Tensor:
    image = view.sky
    x, y = view.at(0.2)
    zigzag = (torch.remainder(x / 64 + view.style(4), 1) - 0.5).abs() * 2
    peak = 44 + 24 * zigzag + ridge(x, view.style(5), (3, 2))
    image = over(image, inside(peak - y), view.far(0.42, 0.50, 0.66, haze=0.25))
    cap = peak + 7 + 2.5 * torch.sin(x / 2.3)
    image = over(image, inside(peak - y) * inside(y - cap), view.far(0.95, 0.97, 1.0, haze=0.1))
    x, y = view.at(0.5)
    hill = 74 + ridge(x, view.style(6), (4, 2))
    number, away = cells(x, 42, view.style(7))
    top = hill - 20 - 5 * fixed_random(number, view.style(8))
    pine = torch.maximum(away.abs() * 1.7 - (y - top) * 0.75, y - hill)
    image = over(image, inside(pine), view.lit(0.14, 0.32, 0.28))
    image = over(image, inside(pine) * inside(away + 1.2), view.lit(0.62, 0.74, 0.78))
    image = over(image, inside(hill - y), view.lit(0.80, 0.86, 0.95))
    x, y = view.at(1.0)
    ground = 87 + ridge(x, view.style(9), (2.5, 1.5))
    depth = ((y - ground) / 26).clamp(0, 1)[:, None]
    return over(image, inside(ground - y), torch.lerp(view.lit(0.97, 0.98, 1.0), view.lit(0.70, 0.78, 0.92), depth))


def city(view: View) -> Tensor:
    image = view.sky
    x, y = view.at(0.2)
    number, away = cells(x, 24, view.style(4) * 0)
    roof = 48 + 16 * fixed_random(number, view.style(5))
    image = over(image, inside(roof - y) * inside(away.abs() - 10), view.far(0.36, 0.42, 0.54, haze=0.4))
    x, y = view.at(0.5)
    number = torch.floor(x / 38)
    away = x - (number + 0.5) * 38
    number = torch.remainder(number, 64)
    roof = 34 + 26 * fixed_random(number, view.style(6))
    house = inside(roof - y) * inside(away.abs() - 16.5)
    warm = fixed_random(number, view.style(7))[:, None]
    image = over(image, house, torch.lerp(view.lit(0.52, 0.36, 0.32), view.lit(0.42, 0.46, 0.54), warm))
    column, row = torch.floor((away + 16) / 8), torch.floor((y - roof) / 9)
    in_x, in_y = away + 16 - 8 * column - 4, y - roof - 9 * row - 5
    lamp = fixed_random(number + 7 * column + 13 * row, view.style(8))
    on = (lamp > 0.35).float()[:, None]
    pane = house * inside(torch.maximum(in_x.abs() - 2, in_y.abs() - 2.6)) * (row >= 0)
    lamplight = torch.lerp(view.lit(0.95, 0.90, 0.70), rgb(1, 0.82, 0.42, like=image), view.night)
    image = over(image, pane, torch.lerp(view.lit(0.30, 0.36, 0.46), lamplight, on))
    x, y = view.at(1.0)
    image = over(image, inside(84 - y).expand(-1, -1, WIDTH), view.lit(0.62, 0.62, 0.62))
    image = over(image, inside(88 - y).expand(-1, -1, WIDTH), view.lit(0.25, 0.26, 0.29))
    dash = (torch.remainder(x + 64 * view.style(9), 48) - 24).abs() - 11
    return over(image, inside(torch.maximum(dash, (y - 101).abs() - 1.2)), view.lit(0.92, 0.88, 0.70))


def forest(view: View) -> Tensor:
    image = view.sky
    x, y = view.at(0.2)
    crown = 38 + ridge(x, view.style(4), (3, 3, 2, 2))
    image = over(image, inside(crown - y), view.far(0.20, 0.40, 0.28, haze=0.3))
    for depth, width, thick, height, bark, leaf in ((0.4, 34, 2.6, 34, (0.30, 0.24, 0.18), (0.15, 0.36, 0.20)),
                                                    (0.65, 58, 4.2, 24, (0.36, 0.25, 0.16), (0.20, 0.47, 0.19))):
        x, y = view.at(depth)
        number, away = cells(x, width, view.style(5) + depth, loose=0.2)
        image = over(image, inside(away.abs() - thick) * inside(height - y), view.lit(*bark))
        top = height - 4 + 6 * fixed_random(number, view.style(6) + depth)
        leaves = torch.minimum((away.square() + ((y - top) * 1.2).square()).sqrt() - 0.35 * width,
                               ((away - 0.2 * width).square() + ((y - top + 7) * 1.3).square()).sqrt() - 0.2 * width)
        image = over(image, inside(leaves), view.lit(*leaf))
    x, y = view.at(1.0)
    ground = 85 + ridge(x, view.style(8), (2, 1.5))
    depth = ((y - ground) / 28).clamp(0, 1)[:, None]
    image = over(image, inside(ground - y), torch.lerp(view.lit(0.34, 0.46, 0.18), view.lit(0.20, 0.26, 0.12), depth))
    number, away = cells(x, 26, view.style(9))
    fern = away.abs() * 0.9 + (y - 92 - 8 * fixed_random(number, view.style(10))).abs() * 1.4
    return over(image, inside(fern - 4), view.lit(0.26, 0.58, 0.22))


SETTINGS: dict[str, Callable[[View], Tensor]] = {
    "meadow": meadow, "sea": sea, "desert": desert, "snow": snow, "city": city, "forest": forest,
}


def paint(frames: Frames) -> Tensor:
    """The scenery without the subject, RGB [N, 3, H, W]."""
    image = frames.time.new_zeros(len(frames), 3, HEIGHT, WIDTH)
    for index, setting in enumerate(SETTINGS.values()):
        weight = frames.shown["setting"][:, index]
        where = weight.nonzero().flatten()
        if len(where):
            view = View(frames[where])
            view.sky = paint_sky(view)
            image.index_add_(0, where, setting(view) * weight[where, None, None, None])
    return image


def paint_sky(view: View) -> Tensor:
    """The sky with the sun, or the moon and stars."""
    light = view.frames.shown["light"][..., None, None]
    image = view.sky
    for index, (x, y, radius, glow, colour) in ((NOON, (152, 20, 8, 22, (1.0, 0.98, 0.80))),
                                                (SUNSET, (44, 46, 12, 40, (1.0, 0.86, 0.45))),
                                                (NIGHT, (152, 20, 9, 20, (0.94, 0.95, 0.85)))):
        away = ((view.x - x).square() + (view.y - y).square()).sqrt()
        cover = torch.maximum(inside(away - radius), 0.5 * smooth(1 - (away - radius) / glow))
        image = over(image, cover * light[:, index], rgb(*colour, like=image))
    column, row = torch.floor(view.x / 16), torch.floor(view.y / 14)
    number = column + 12 * row
    x = view.x - 16 * column - 3 - 10 * fixed_random(number, view.style(12))
    y = view.y - 14 * row - 3 - 8 * fixed_random(number, view.style(13))
    star = inside((x.square() + y.square()).sqrt() - 0.8) * (fixed_random(number, view.style(14)) > 0.4)
    return over(image, 0.9 * star * light[:, NIGHT], rgb(1, 1, 1, like=image))


def paint_weather(image: Tensor, frames: Frames) -> Tensor:
    """Falling snow and rain, in front of everything."""
    for index, painter in ((SNOWFALL, _snowfall), (RAIN, _rain)):
        weight = frames.shown["light"][:, index]
        where = weight.nonzero().flatten()
        if len(where):
            image[where] = painter(image[where], frames[where], weight[where, None, None])
    return image


def _snowfall(image: Tensor, frames: Frames, weight: Tensor) -> Tensor:
    x, y = grid(image.device)
    time = frames.time[:, None, None]
    for layer, (size, radius, speed, depth) in enumerate(((20, 1.1, 16, 0.3), (28, 1.6, 22, 0.7), (40, 2.2, 30, 1.1))):
        seed = frames.style[:, 15 + layer, None, None]
        fall = y - speed * time
        row = torch.floor(fall / size)
        across = x + depth * frames.travel[:, None, None] + 1000 + size * fixed_random(row, seed)
        column = torch.floor(across / size)
        number = torch.remainder(column, 16) + 16 * torch.remainder(row, 16)
        dx = across - size * (column + 0.25 + 0.5 * fixed_random(number, seed + 1)) - 2 * torch.sin(2 * time + number)
        dy = fall - size * (row + 0.25 + 0.5 * fixed_random(number, seed + 2))
        flake = inside((dx.square() + dy.square()).sqrt() - radius, softness=1.0)
        image = over(image, 0.9 * flake * weight, rgb(1, 1, 1, like=image))
    return image


def _rain(image: Tensor, frames: Frames, weight: Tensor) -> Tensor:
    x, y = grid(image.device)
    time = frames.time[:, None, None]
    for layer, (width, height, speed, depth) in enumerate(((11, 30, 104, 0.4), (17, 40, 136, 1.0))):
        seed = frames.style[:, 18 + layer, None, None]
        across = x + 0.2 * y + depth * frames.travel[:, None, None] + 1000
        column = torch.floor(across / width)
        number = torch.remainder(column, 64)
        fall = y - speed * time + height * fixed_random(number, seed)
        dx = across - width * (column + 0.2 + 0.6 * fixed_random(number, seed + 1))
        dy = torch.remainder(fall, height) - height / 2
        drop = inside(dx.abs() - 0.5) * smooth(1 - dy.abs() / 7)
        image = over(image, 0.5 * drop * weight, rgb(0.82, 0.88, 0.96, like=image))
    return image
