"""Pixels -> bytes of a PNG or JPEG, the same bytes for the same pixels."""

from collections.abc import Mapping

import numpy as np
import simplejpeg

from diffusion.data.pictures import png
from diffusion.data.pictures.opencv import opencv

_DRAWN = 0.4  # share of pixels equal to their left neighbour, from which a picture counts as drawn


def encode_png(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes, the same for the same input.  `text` goes into UTF-8 text chunks, in its order.

    Made to be decoded fast: drawings are searched for repeats and not filtered, photographs are filtered by the average
    of their neighbours and searched for runs alone.  Either decodes faster than Pillow's choice, at about its size.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"encode_png takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    cv2 = opencv()
    drawn = (image[::2, 1:] == image[::2, :-1]).mean() > _DRAWN if image.shape[1] > 1 else False
    if drawn:
        how = (6, cv2.IMWRITE_PNG_STRATEGY_DEFAULT, cv2.IMWRITE_PNG_FILTER_NONE)
    else:
        how = (1, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_FILTER_AVG)
    keys = (cv2.IMWRITE_PNG_COMPRESSION, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_FILTER)
    flags = [number for pair in zip(keys, how, strict=True) for number in pair]
    _, data = cv2.imencode(".png", cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2BGR), flags)
    return png.with_text(data.tobytes(), text or {})


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 (H, W, 3) -> JPEG bytes of `quality` 1 to 100, colours at full resolution: a dataset is encoded once more."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"encode_jpeg takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="444")
