"""The plot of a sweep: quality against time, drawn with Pillow alone."""

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion.evaluation.report.plot import BLUE, BOTTOM, GREY, INK, LEFT, RED, RIGHT, SIZE, TOP

if TYPE_CHECKING:
    from diffusion.evaluation.sweep.report import Sweep


def pareto_plot(found: "Sweep") -> np.ndarray:
    """Frechet distance, with its interval, over evaluations a picture (logarithmic); blue: the front, red: the chosen one.

    Only what was measured on as many samples as the chosen one: others are not comparable.  Returns uint8 (360, 640, 3).
    """
    samples = found.tried[found.chosen].samples
    shown = {i: one for i, one in enumerate(found.tried) if one.samples == samples and one.value is not None}
    canvas = Image.new("RGB", SIZE, "#ffffff")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    title = (
        f"Frechet distance ({samples:,} samples) by evaluations a picture; {len(shown)} of {len(found.tried)} settings"
    )
    draw.text((LEFT, 14), title, INK, font)
    low, high = min(one.low for one in shown.values()), max(one.high for one in shown.values())
    step = _step((high - low) or high or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    first = min(one.evaluations for one in shown.values()) / 1.15
    last = max(one.evaluations for one in shown.values()) * 1.15

    def x(evaluations: float) -> float:
        return LEFT + (SIZE[0] - LEFT - RIGHT) * math.log(evaluations / first) / math.log(last / first)

    def y(value: float) -> float:
        return SIZE[1] - BOTTOM - (SIZE[1] - BOTTOM - TOP) * (value - low) / ((high - low) or 1.0)

    for i in range(round((high - low) / step) + 1):
        draw.line([(LEFT, y(low + i * step)), (SIZE[0] - RIGHT, y(low + i * step))], GREY)
        draw.text((LEFT - 8, y(low + i * step)), f"{low + i * step:g}", INK, font, anchor="rm")
    edge = -math.inf
    for evaluations in sorted({one.evaluations for one in shown.values()}):
        if x(evaluations) - edge > 28:  # else the numbers would touch
            edge = x(evaluations)
            draw.text((edge, SIZE[1] - BOTTOM + 8), str(evaluations), INK, font, anchor="ma")
    draw.text((SIZE[0] / 2, SIZE[1] - 16), "evaluations a picture", INK, font, anchor="mm")
    draw.line([(x(shown[i].evaluations), y(shown[i].value)) for i in found.front], BLUE, width=2)
    order = sorted(shown, key=lambda i: (i == found.chosen, i in found.front))  # what matters most on top
    for number in order:
        one, colour = shown[number], "#909090"
        colour = RED if number == found.chosen else BLUE if number in found.front else colour
        draw.line([(x(one.evaluations), y(one.low)), (x(one.evaluations), y(one.high))], colour)
        draw.circle((x(one.evaluations), y(one.value)), 4, colour)
        if number in found.front or number == found.chosen:
            draw.text((x(one.evaluations) + 7, y(one.value) - 9), str(number), colour, font, anchor="lm")
    return np.array(canvas)


def _step(span: float) -> float:
    """Of 4 to 10 lines over a span: 1, 2 or 5 times a power of ten."""
    decade = 10.0 ** math.floor(math.log10(span))
    return decade * (0.2 if span < 2 * decade else 0.5 if span < 5 * decade else 1)
