"""Pixels -> bytes of a PNG or JPEG, the same bytes for the same pixels."""

from collections.abc import Mapping

import numpy as np
import simplejpeg

from diffusion.data.pictures import png
from diffusion.data.pictures.opencv import opencv
from diffusion.data.pictures.plain_png import encode_plain

_NEAR = 2  # levels of 255: where a photograph is smooth, neighbours differ by no more
# the share of equal neighbours below which runs would save 3 % of the bytes at most, and their search takes 10 to 20 %
# of the time
_ROUGH = 0.06


def encode_png(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes, the same for the same input.  `text` goes into UTF-8 text chunks, in its order.

    Made to be decoded fast: drawings, in which neighbours are more often equal than nearly so, are searched for repeats and
    not filtered; photographs are filtered by the average of their neighbours and searched for runs alone, or for nothing
    where hardly two neighbours are equal.  Each decodes faster than Pillow's choice, at about its size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"encode_png takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    steps = image[::2, 1:] - image[::2, :-1]  # to the right in every other line, modulo 256
    equal = steps.size - np.count_nonzero(steps)
    rough = equal < _ROUGH * steps.size
    if not rough and 2 * equal > np.count_nonzero(steps + np.uint8(_NEAR) <= 2 * _NEAR):
        data = encode_plain(image)
    else:
        data = _filtered(image, rough)
    return png.with_text(data, text) if text else data


def _filtered(image: np.ndarray, rough: bool) -> bytes:
    """PNG bytes of a photograph."""
    cv2 = opencv()
    how = [
        *(cv2.IMWRITE_PNG_COMPRESSION, 1),
        *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY if rough else cv2.IMWRITE_PNG_STRATEGY_RLE),
        *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG),
    ]
    return cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR), how)[1].tobytes()


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 (H, W, 3) -> JPEG bytes of `quality` 1 to 100, colours at full resolution: a dataset is encoded once more."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"encode_jpeg takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="444")
