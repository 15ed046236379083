"""Pictures as photographs are, made from a seed: power falling with frequency, colours smoother, a few sharp edges."""

import numpy as np


def photograph(side: int, seed: int) -> np.ndarray:
    """uint8 (side, side, 3)."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * side
    frequency[0, 0] = 1

    def field(fall: float) -> np.ndarray:
        spectrum = np.fft.rfft2(draw.standard_normal((side, side))) / frequency**fall
        values = np.fft.irfft2(spectrum, s=(side, side))
        return (values - values.mean()) / values.std()

    bright, blue, red = field(1.3) * 38, field(1.8) * 14, field(1.8) * 14
    down, right = np.indices((side, side)) / side
    for _ in range(6):
        x, y, turn = draw.random(3)
        wide, high = draw.random(2) * 0.3 + 0.05
        along = (right - x) * np.cos(3 * turn) + (down - y) * np.sin(3 * turn)
        across = (down - y) * np.cos(3 * turn) - (right - x) * np.sin(3 * turn)
        inside = (along / wide) ** 2 + (across / high) ** 2 < 1
        bright = np.where(inside, bright * 0.6 + draw.uniform(-50, 50), bright)
        blue = np.where(inside, blue * 0.5 + draw.uniform(-25, 25), blue)
        red = np.where(inside, red * 0.5 + draw.uniform(-25, 25), red)
    bright = bright + 125
    rgb = np.stack([bright + 1.402 * red, bright - 0.344 * blue - 0.714 * red, bright + 1.772 * blue], -1)
    return rgb.clip(0, 255).round().astype(np.uint8)
