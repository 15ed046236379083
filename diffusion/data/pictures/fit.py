"""From all pixels of a picture to the square of a dataset: wanted or not, its identity, background, crop, resize."""

import hashlib
from functools import lru_cache

import numpy as np
from PIL import Image

from diffusion.data.pictures.bad_picture import TOO_ELONGATED, TOO_SMALL, BadPicture
from diffusion.data.pictures.opencv import opencv

_BITS = 22  # of a filter's coefficient, and
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


def fit(image: Image.Image | np.ndarray, *, resolution: int, background: str) -> np.ndarray:
    """RGB or RGBA picture -> uint8 (resolution, resolution, 3): composited, centre-cropped, resized."""
    pixels = opaque(np.asarray(image), background)
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    return np.array(square) if side == resolution else _lanczos(square, resolution)


def _lanczos(square: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (side, side, 3) -> (resolution, resolution, 3) by an antialiased Lanczos filter.

    Every bit as Pillow's `resize(..., LANCZOS)`, in half the time and less.  Rows are filtered first, and rounded to 8
    bits; then columns.  Coefficients are multiples of 2^-22 and sums stay below 2^9, so in float64 they are exact in any
    order and on any machine, and the work can be left to a product of matrices.
    """
    cv2 = opencv()
    side, blocks = len(square), _filter(len(square), resolution)
    narrow = np.empty((3, side, resolution))
    height = max(1, _BAND // side)
    for start in range(0, side, height):
        band = square[start : start + height]
        planes = np.empty((3, *band.shape[:2]))
        for plane, values in zip(planes, cv2.split(band), strict=True):
            plane[:] = values
        rows, sums = planes.reshape(-1, side), np.empty((3 * len(band), resolution))
        for at, (low, high, weights) in blocks.items():
            np.matmul(rows[:, low:high], weights, out=sums[:, at : at + weights.shape[1]])
        narrow[:, start : start + height] = _rounded(sums).reshape(3, -1, resolution)
    sums = np.empty((3, resolution, resolution))
    for at, (low, high, weights) in blocks.items():
        np.matmul(weights.T, narrow[:, low:high], out=sums[:, at : at + weights.shape[1]])
    return cv2.merge(list(_rounded(sums)))


def _rounded(sums: np.ndarray) -> np.ndarray:
    """Multiples of 2^-22 -> uint8, halves up, clipped.  A tick more makes OpenCV's halves to even halves up."""
    cv2 = opencv()
    flat = sums.reshape(-1, sums.shape[-1])
    return cv2.add(flat, 2.0 ** -(_BITS + 1), dtype=cv2.CV_8U).reshape(sums.shape)


@lru_cache(maxsize=32)  # pictures of one size come often, and a folder of all sizes must not fill the memory
def _filter(side: int, resolution: int) -> dict[int, tuple[int, int, np.ndarray]]:
    """The filter from `side` pixels to `resolution`, by the first output of each block of outputs: (low, high, weights
    (high - low, outputs)), where inputs [low, high) are all that the block depends on.  [Duchon 1979]
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
        matrix = np.zeros((last - first, len(low[block])))
        for column, (begin, end) in enumerate(zip(low[block, 0], high[block, 0], strict=True)):
            matrix[begin - first : end - first, column] = weights[at + column, : end - begin]
        blocks[at] = (first, last, matrix)
    return blocks
