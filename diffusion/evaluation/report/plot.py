"""The plots of the held-out loss and of the bound by noise level, drawn with Pillow alone."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from diffusion.evaluation.facts.bound import HeldOutBound
    from diffusion.evaluation.facts.held_out import HeldOutLoss

SIZE = (640, 360)
LEFT, TOP, RIGHT, BOTTOM = 70, 44, 20, 50  # margins
INK, GREY, BLUE, RED = "#202020", "#d8d8d8", "#2060c0", "#c04030"


def loss_plot(levels: "tuple[HeldOutLoss, ...]") -> np.ndarray:
    """Loss over sigma, both axes logarithmic, with 2 standard errors; dashed: a network that answers 0.

    Levels whose loss is not finite are left out.  Returns uint8 (360, 640, 3).
    """
    shown = sorted((level for level in levels if level.loss and level.zero), key=lambda level: level.sigma)
    canvas = Image.new("RGB", SIZE, "#ffffff")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    draw.text((LEFT, 14), "held-out loss by noise level", INK, font)
    if not shown:
        draw.text((LEFT, SIZE[1] / 2), "no finite loss to show", RED, font)
        return np.array(canvas)
    spans = [_span(level) for level in shown]
    low = 10 ** math.floor(math.log10(min(bottom for bottom, _ in spans)))
    high = 10 ** math.ceil(math.log10(max(*(top for _, top in spans), *(level.zero for level in shown), 1.0001 * low)))
    first, last = shown[0].sigma / 1.3, shown[-1].sigma * 1.3

    def x(sigma: float) -> float:
        return LEFT + (SIZE[0] - LEFT - RIGHT) * math.log(sigma / first) / math.log(last / first)

    def y(loss: float) -> float:
        return TOP + (SIZE[1] - TOP - BOTTOM) * math.log(high / loss) / math.log(high / low)

    for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**exponent
            if value <= high * 1.0001:
                draw.line([(LEFT, y(value)), (SIZE[0] - RIGHT, y(value))], GREY)
                draw.text((LEFT - 8, y(value)), f"{value:g}", INK, font, anchor="rm")
    for level in shown:
        draw.text((x(level.sigma), SIZE[1] - BOTTOM + 8), f"{level.sigma:g}", INK, font, anchor="ma")
    draw.text((SIZE[0] / 2, SIZE[1] - 16), "sigma", INK, font, anchor="mm")
    zeros = [(x(level.sigma), y(level.zero)) for level in shown]
    _dashed(draw, zeros)
    draw.line([(x(level.sigma), y(level.loss)) for level in shown], BLUE, width=2)
    for level, (bottom, top) in zip(shown, spans, strict=True):
        draw.line([(x(level.sigma), y(bottom)), (x(level.sigma), y(top))], BLUE, width=2)
        draw.circle((x(level.sigma), y(level.loss)), 4, BLUE)
    draw.line([(SIZE[0] - 300, 22), (SIZE[0] - 276, 22)], BLUE, width=2)
    draw.text((SIZE[0] - 270, 22), "model", INK, font, anchor="lm")
    _dashed(draw, [(SIZE[0] - 200, 22), (SIZE[0] - 176, 22)])
    draw.text((SIZE[0] - 170, 22), "network that answers 0", INK, font, anchor="lm")
    return np.array(canvas)


def bound_plot(bound: "HeldOutBound") -> np.ndarray:
    """Bits per value in each part of the bound: the decoder, then the KL terms by noise level.  Returns uint8 (360, 640, 3).

    Parts that are not finite are left out.
    """
    canvas = Image.new("RGB", SIZE, "#ffffff")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    draw.text((LEFT, 14), "variational bound, bits per value: decoder (red) and KL terms by noise level", INK, font)
    bars = [bound.decoder, *(part.bits for part in bound.profile)]
    high = max((bits for bits in bars if bits), default=0.0)
    if not high:
        draw.text((LEFT, SIZE[1] / 2), "no finite part to show", RED, font)
        return np.array(canvas)
    width, floor = (SIZE[0] - LEFT - RIGHT) / len(bars), SIZE[1] - BOTTOM
    decade = 10.0 ** math.floor(math.log10(high))
    step = decade / (4 if high < 2 * decade else 2 if high < 5 * decade else 1)  # 4 to 10 lines
    height = (floor - TOP) / high
    for i in range(int(high / step) + 1):
        y = floor - i * step * height
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], GREY)
        draw.text((LEFT - 8, y), f"{i * step:g}", INK, font, anchor="rm")
    for i, bits in enumerate(bars):
        left = LEFT + i * width
        if bits is not None:
            draw.rectangle([left + 2, floor - bits * height, left + width - 3, floor], RED if i == 0 else BLUE)
    edges = [bound.profile[0].sigma_from, *(part.sigma_to for part in bound.profile)]
    for i, sigma in enumerate(edges, 1):
        draw.text((LEFT + i * width, floor + 8), f"{sigma:.2g}", INK, font, anchor="ma")
    draw.text((SIZE[0] / 2, SIZE[1] - 16), "sigma", INK, font, anchor="mm")
    return np.array(canvas)


def _span(level: "HeldOutLoss") -> tuple[float, float]:
    reach = 2 * (level.standard_error or 0.0)
    return max(level.loss - reach, level.loss / 10), level.loss + reach


def _dashed(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], dash: float = 5.0) -> None:
    for (x0, y0), (x1, y1) in pairwise(points):
        pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / dash))
        for i in range(0, pieces, 2):
            a, b = i / pieces, min(1.0, (i + 1) / pieces)
            draw.line(
                [(x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))], RED, width=2
            )
