"""From all pixels of a picture to those of a dataset: wanted or not, its identity, background, crop, resize."""

import hashlib
from functools import lru_cache

import numpy as np
from PIL import Image

from diffusion.data.pictures.bad_picture import TOO_ELONGATED, TOO_SMALL, BadPicture
from diffusion.data.pictures.opencv import opencv

_BITS = 20  # of a filter's coefficient
_OUTPUTS = 8  # pixels computed by one product of matrices: few, since the matrix of all is mostly zeros
_BAND = 2**16  # pixels resized at a time: they stay in the processor's cache


def check_wanted(width: int, height: int, *, min_side: int, max_aspect: float | None) -> None:
    """Raises BadPicture where the shorter side has less than `min_side` pixels, or the longer more than `max_aspect`
    times the shorter.
    """
    if min(width, height) < min_side:
        raise BadPicture(TOO_SMALL, f"{width} x {height}: shard.min_side is {min_side}")
    if max_aspect is not None and max(width, height) > max_aspect * min(width, height):
        raise BadPicture(TOO_ELONGATED, f"{width} x {height}: shard.max_aspect is {max_aspect:g}")


def content_digest(image: Image.Image | np.ndarray) -> str:
    """sha256 of the pixels at their own size: equal for one picture saved twice, whatever the file format."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    if pixels.shape[2] == 3:
        cv2 = opencv()
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    digest = hashlib.sha256(b"%dx%d:" % (width, height))
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def opaque(pixels: np.ndarray, background: str) -> np.ndarray:
    """RGB or RGBA (H, W, 3 or 4) -> RGB, composited on "#rrggbb"."""
    if pixels.shape[2] == 3:
        return pixels
    picture = Image.fromarray(pixels)
    return np.array(Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB"))


def fit(image: Image.Image | np.ndarray, *, size: tuple[int, int], background: str) -> np.ndarray:
    """RGB or RGBA picture -> uint8 (*size, 3), size (height, width): composited, centre-cropped to that shape, resized.

    The crop has whole pixels, so a shape that is no square's is met to half a pixel of the source.
    """
    pixels = opaque(np.asarray(image), background)
    height, width = cropped(*pixels.shape[:2], size)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    window = pixels[top : top + height, left : left + width]
    return np.array(window) if (height, width) == size else _lanczos(window, *size)


def cropped(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the largest window, in whole pixels, of the shape of `size` within height x width pixels."""
    high, wide = size
    if width * high > height * wide:
        return height, max(1, (2 * height * wide + high) // (2 * high))
    return max(1, (2 * width * high + wide) // (2 * wide)), width


def _lanczos(window: np.ndarray, high: int, wide: int) -> np.ndarray:
    """uint8 (height, width, 3) -> (high, wide, 3) by an antialiased Lanczos filter, as wide as Pillow's: columns, then rows.

    It rounds once, at the end; Pillow rounds and clips in between, so that its pixels are farther from the filter's values.
    Coefficients are multiples of 2^-20 and sums stay below 2^10, so in float64 both passes are exact in any order and on any
    machine, and the work can be left to products of matrices.
    """
    cv2 = opencv()
    height, width = window.shape[:2]
    columns = np.empty((high, width * 3))
    at_once = max(1, _BAND // height)
    for left in range(0, width, at_once):
        band = window[:, left : left + at_once].astype(np.float64, order="C")
        _filtered(band.reshape(height, -1), columns[:, 3 * left : 3 * (left + at_once)])
    sums = np.empty((wide, high * 3))
    _filtered(cv2.transpose(columns.reshape(high, width, 3)).reshape(width, -1), sums)
    return cv2.transpose(_rounded(sums).reshape(wide, high, 3))


def _filtered(values: np.ndarray, out: np.ndarray) -> None:
    """float64 (side, n) -> out, (outputs, n)."""
    for at, (low, weights) in _filter(len(values), len(out)).items():
        np.matmul(weights, values[low : low + weights.shape[1]], out=out[at : at + len(weights)])


def _rounded(sums: np.ndarray) -> np.ndarray:
    """Multiples of 2^-40 -> uint8, halves up, clipped.  A tick more makes OpenCV's halves to even halves up."""
    cv2 = opencv()
    return cv2.add(sums, 2.0 ** -(2 * _BITS + 1), dtype=cv2.CV_8U).reshape(sums.shape)


@lru_cache(maxsize=64)  # pictures of one size come often, and a folder of all sizes must not fill the memory
def _filter(side: int, resolution: int) -> dict[int, tuple[int, np.ndarray]]:
    """The filter from `side` pixels to `resolution`, by the first output of each block of outputs: (low, weights (outputs,
    inputs)), where the inputs from `low` on are all that the block depends on.  [Duchon 1979]
    """
    scale = side / resolution
    stretch = max(scale, 1.0)  # of a larger picture the filter is as wide as six output pixels: no aliasing
    centre = (np.arange(resolution) + 0.5)[:, None] * scale
    low = np.maximum((centre - 3 * stretch + 0.5).astype(int), 0)
    high = np.minimum((centre + 3 * stretch + 0.5).astype(int), side)
    place = low + np.arange((high - low).max())
    x = (place - centre + 0.5) * (1 / stretch)
    weights = np.where((place < high) & (x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)
    weights /= weights.sum(1, keepdims=True)
    weights = np.copysign(np.floor(np.abs(weights) * 2**_BITS + 0.5), weights) * 2.0**-_BITS
    blocks = {}
    for at in range(0, resolution, _OUTPUTS):
        block = slice(at, at + _OUTPUTS)
        first, last = int(low[block].min()), int(high[block].max())
        matrix = np.zeros((len(low[block]), last - first))
        for row, (begin, end) in enumerate(zip(low[block, 0], high[block, 0], strict=True)):
            matrix[row, begin - first : end - first] = weights[at + row, : end - begin]
        blocks[at] = (first, matrix)
    return blocks
