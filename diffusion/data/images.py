"""Pictures: bytes <-> uint8 (H, W, 3) <-> float [-1, 1].  The only place that knows 127.5.

What happens to a picture on its way into a shard, in this order: all its pixels decoded to 8 bits, EXIF orientation
applied (`decode.py`), transparency composited on the background, the largest centred square cut out, or the largest window
of the shape of its bucket (`buckets.py`), resized with an antialiased Lanczos filter (an exact copy where it already has
the size; `fit.py`), encoded (`encode.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion.data.pictures.bad_picture import BadPicture
from diffusion.data.pictures.decode import decode_all, decode_png
from diffusion.data.pictures.encode import encode_jpeg, encode_png
from diffusion.data.pictures.fit import content_digest, fit
from diffusion.data.pictures.png import png_text
from diffusion.data.pictures.webp import encode_webp, is_webp, webp_text

if TYPE_CHECKING:  # workers that shard, and the command line, do without 200 MB of torch
    from torch import Tensor

__all__ = [
    "BadPicture",
    "content_digest",
    "decode",
    "decode_all",
    "decode_png",
    "encode_jpeg",
    "encode_png",
    "encode_webp",
    "fit",
    "grid",
    "is_webp",
    "load",
    "png_text",
    "to_model",
    "to_uint8",
    "webp_text",
]


def decode(data: bytes, *, resolution: int, background: str) -> np.ndarray:
    """A picture file's bytes -> its square, uint8 (resolution, resolution, 3), as the module says; background "#rrggbb".

    Raises BadPicture of kind: empty, not a picture, too many pixels, truncated, damaged, unsupported pixels.
    """
    return fit(decode_all(data), size=(resolution, resolution), background=background)


def load(data: bytes) -> Image.Image:
    """`decode_all` for those who go on with Pillow: RGB or RGBA.  Raises BadPicture."""
    return Image.fromarray(decode_all(data))


def to_model(images: "Tensor") -> "Tensor":
    """uint8 (B, H, W, 3) or (B, 3, H, W) in 0..255 -> float32 (B, 3, H, W) in [-1, 1], contiguous."""
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        shape = tuple(images.shape)
        raise ValueError(f"to_model takes uint8 (B, 3, H, W) or (B, H, W, 3), not {images.dtype} {shape}")
    if images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous().float() / 127.5 - 1


def to_uint8(x: "Tensor") -> "Tensor":
    """Float (B, 3, H, W), [-1, 1] and clipped to it -> uint8 (B, H, W, 3): the inverse of `to_model`.

    Raises ValueError where a value is not finite: that is no picture.
    """
    import torch

    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"to_uint8 takes float (B, 3, H, W), not {x.dtype} {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("to_uint8: the picture has values that are not finite (NaN or infinite)")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid(
    images: Sequence[np.ndarray] | np.ndarray, columns: int, row_labels: Sequence[str] = (), *, gap: int = 2
) -> np.ndarray:
    """Pictures uint8 (h, w, 3), row by row -> one uint8 (H, W, 3), white between and around them.

    Of several sizes each stands in the middle of a cell that holds any.  `row_labels`, one per row, are written at the
    left of their rows.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"grid of {len(images)} pictures in {columns} columns: need at least one of each")
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    rows = -(-len(images) // columns)
    if row_labels and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} labels for {rows} rows of {columns} pictures")
    font = ImageFont.load_default(size=max(10, min(16, height // 4)))
    margin = max((int(font.getlength(label)) + 3 * gap for label in row_labels), default=0)
    size = (margin + gap + columns * (width + gap), gap + rows * (height + gap))
    canvas = Image.new("RGB", size, "#ffffff")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        draw.text((margin - gap, gap + row * (height + gap) + height // 2), label, "#000000", font, anchor="rm")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        beside = (width - image.shape[1]) // 2, (height - image.shape[0]) // 2
        place = (margin + gap + column * (width + gap) + beside[0], gap + row * (height + gap) + beside[1])
        canvas.paste(Image.fromarray(np.ascontiguousarray(image)), place)
    return np.array(canvas)
