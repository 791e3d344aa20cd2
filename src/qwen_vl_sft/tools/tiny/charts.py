"""Seeded charts of 112x112 pixels: the specification is sampled first, then drawn, so every label is known exactly."""

from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 112
KINDS = ("bar", "hbar", "line", "pie")
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (245, 220, 40),
    "green": (30, 150, 50),
    "blue": (30, 80, 220),
    "purple": (140, 40, 170),
    "black": (20, 20, 20),
}
WHITE, GRID, AXIS = 0, 1, 2  # palette entries before the colors
PALETTE = [(255, 255, 255), (215, 215, 215), (120, 120, 120), *COLORS.values()]
INK = {color: index + 3 for index, color in enumerate(COLORS)}

MAX_VALUE = 9  # of a bar or point; the axis runs from 0 to 10
PIE_VALUES = (1, 2, 4, 7)  # at least a factor of 1.75 apart: a pie has no axis to read close slices from
UNIT = 10  # pixels per unit of value
ORIGIN = 8  # pixels between the image's edge and the axis, for its labels
TURN = 4096  # angle steps in a full turn of a pie
GLYPHS = {"0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "5": (7, 4, 7, 1, 7)}  # 3x5 pixels, one number per row


@dataclass(frozen=True)
class Chart:
    """What a chart shows: a kind, and for each item a color and a whole value; `shape` only changes its looks.

    Items run from left to right, from top to bottom (hbar) or clockwise (pie). `shape` is an item's width in percent
    of its slot, or the start angle of a pie in sixteenths of a turn.
    """

    kind: str
    colors: tuple[str, ...]
    values: tuple[int, ...]
    shape: int

    def value(self, color: str) -> int:
        """Return the value of the item with this color."""
        return self.values[self.colors.index(color)]


def random_chart(rng: Random) -> Chart:
    """Sample a chart of 2 to 5 items (pie: 2 to 4) with distinct colors and values, so that each question has one answer."""
    kind = rng.choice(KINDS)
    pie = kind == "pie"
    count = rng.randint(2, len(PIE_VALUES) if pie else 5)
    values = rng.sample(PIE_VALUES if pie else range(1, MAX_VALUE + 1), count)
    shape = rng.randrange(16) if pie else rng.randint(50, 85)
    return Chart(kind, tuple(rng.sample(list(COLORS), count)), tuple(values), shape)


def draw(chart: Chart) -> Image.Image:
    """Draw the chart as a 112x112 palette image (mode P, ten colors, so that its PNG is a few hundred bytes)."""
    if chart.kind == "pie":
        image = Image.fromarray(_pie_pixels(chart))
    else:
        image = Image.new("L", (SIZE, SIZE), WHITE)
        _draw_axis_chart(ImageDraw.Draw(image), chart)
    image.putpalette([channel for color in PALETTE for channel in color])  # turns L into P
    return image


def _pie_pixels(chart: Chart) -> np.ndarray:
    """Return palette indices [112, 112], uint8; slices start at `shape` and run clockwise."""
    offset = np.arange(SIZE) - (SIZE - 1) / 2
    dx, dy = offset[None, :], offset[:, None]
    # A quarter step keeps exact diagonals off the step borders, where rounding differs between math libraries.
    steps = np.floor(np.arctan2(dy, dx) / (2 * np.pi) * TURN + 0.25).astype(int) - chart.shape * TURN // 16
    ends = np.cumsum(chart.values) * TURN // sum(chart.values)
    item = np.searchsorted(ends, steps % TURN, side="right")
    ink = np.array([INK[color] for color in chart.colors], dtype=np.uint8)[item]
    return np.where(dx**2 + dy**2 <= 50**2, ink, np.uint8(WHITE))


def item_boxes(chart: Chart) -> list[tuple[int, int, int, int]]:
    """Return the first and last column and row of each bar or point, both inclusive: (left, top, right, bottom)."""
    start, stop = _extent(chart)
    slot = (stop - start) / len(chart.values)
    half = int(slot * chart.shape / 200)
    found = []
    for center, value in zip(_centers(chart), chart.values, strict=True):
        if chart.kind == "line":
            extent, height = (center - 4, center + 4), (value * UNIT - 4, value * UNIT + 4)
        else:
            extent, height = (center - half, center + half), (1, value * UNIT)
        found.append(_box(chart, extent, height))
    return found


def _extent(chart: Chart) -> tuple[int, int]:
    """Return first and last pixel along the axis."""
    return (2, SIZE - 8) if chart.kind == "hbar" else (12, SIZE - 2)


def _centers(chart: Chart) -> list[int]:
    start, stop = _extent(chart)
    slot = (stop - start) / len(chart.values)
    return [int(start + slot * (index + 0.5)) for index in range(len(chart.values))]


def _box(chart: Chart, along: tuple[int, int], height: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixel box of an extent along the axis and one in height above it."""
    if chart.kind == "hbar":
        return (ORIGIN + height[0], along[0], ORIGIN + height[1], along[1])
    base = SIZE - ORIGIN
    return (along[0], base - height[1], along[1], base - height[0])


def _draw_axis_chart(canvas: ImageDraw.ImageDraw, chart: Chart) -> None:
    for tick in (0, 5, 10):
        canvas.rectangle(_box(chart, _extent(chart), (tick * UNIT, tick * UNIT)), fill=GRID if tick else AXIS)
        lying = chart.kind == "hbar"
        at = (ORIGIN + tick * UNIT - 3, SIZE - 6) if lying else (1, SIZE - ORIGIN - tick * UNIT - 2)
        _label(canvas, str(tick), at)

    if chart.kind == "line":
        shown = zip(_centers(chart), chart.values, strict=True)
        points = [_box(chart, (x, x), (v * UNIT, v * UNIT))[:2] for x, v in shown]
        canvas.line(points, fill=AXIS, width=1)
    for box, color in zip(item_boxes(chart), chart.colors, strict=True):
        canvas.rectangle(box, fill=INK[color])


def _label(canvas: ImageDraw.ImageDraw, digits: str, at: tuple[int, int]) -> None:
    """Draw pixel digits of our own: FreeType versions draw fonts differently."""
    for index, digit in enumerate(digits):
        for y, bits in enumerate(GLYPHS[digit]):
            for x in range(3):
                if bits >> (2 - x) & 1:
                    canvas.point((at[0] + 4 * index + x, at[1] + y), fill=AXIS)
