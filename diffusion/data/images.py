"""Pictures: bytes <-> uint8 (H, W, 3) <-> float [-1, 1].  The only place that knows 127.5.

What happens to a picture on its way into a shard, in this order: EXIF orientation applied, 16-bit grey brought to 8,
transparency composited on the background, the largest centred square cut out, resized with an antialiased Lanczos
filter (an exact copy where the square already has the size).  Colour profiles are ignored; of an animation the first
frame counts.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError

from diffusion.data.decode import BadPicture

if TYPE_CHECKING:  # workers that shard, and the command line, do without 200 MB of torch
    from torch import Tensor

MAX_PIXELS = 2**26  # 8192 x 8192: a file of kilobytes can claim more than a machine has memory
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def decode(data: bytes, *, resolution: int, background: str) -> np.ndarray:
    """A picture file's bytes -> uint8 (resolution, resolution, 3), as the module says.  `background` is "#rrggbb".

    Raises BadPicture of kind: empty, not a picture, too many pixels, truncated, damaged, unsupported pixels.
    """
    return fit(load(data), resolution=resolution, background=background)


def load(data: bytes) -> Image.Image:
    """A picture file's bytes -> all its pixels, upright, mode RGB or RGBA.  Raises BadPicture."""
    with _named_damage(data):
        image = ImageOps.exif_transpose(_open(data, _FORMATS))
        if image.mode in _SIXTEEN_BIT:
            return _eight_bit(image).convert("RGB")
        if image.mode == "F":
            raise BadPicture("unsupported pixels", "floating-point values, whose range no file states")
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


@contextmanager
def _named_damage(data: bytes) -> Iterator[None]:
    """Whatever the decoders raise in the block becomes a BadPicture."""
    try:
        yield
    except (BadPicture, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadPicture("not a picture", f"begins with {data[:8].hex(' ')}: none of the formats expected") from error
    except Image.DecompressionBombError as error:
        raise BadPicture("too many pixels", str(error)) from error
    except Exception as error:  # damaged files make the decoders raise nearly any type
        text = f"{type(error).__name__}: {error}"
        truncated = re.search(r"truncat|unexpected end|not enough|ran out", text, re.IGNORECASE)
        raise BadPicture("truncated" if truncated else "damaged", text) from error


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """The first frame with its pixels read, not larger than the limit."""
    if not data:
        raise BadPicture("empty", "the file has no bytes")
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadPicture("too many pixels", f"{width} x {height} is more than the limit of {MAX_PIXELS:,} pixels")
    image.load()
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey, 0..65535 -> 8-bit grey, 0..255, rounded."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise BadPicture("unsupported pixels", f"mode {image.mode} with values {values.min()} to {values.max()}")
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))


def content_digest(image: Image.Image) -> str:
    """sha256 of the pixels at their own size: equal for one picture saved twice, whatever the file format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.convert("RGBA").tobytes()).hexdigest()


def fit(image: Image.Image, *, resolution: int, background: str) -> np.ndarray:
    """RGB or RGBA picture -> uint8 (resolution, resolution, 3): composited, centre-cropped, resized."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side == resolution:
        return np.array(image.crop(box))
    return np.array(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box))


def encode_png(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes, the same for the same input.  `text` goes into UTF-8 text chunks, in its order."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"encode_png takes uint8 (H, W, 3), not {image.dtype} {image.shape}")
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG", pnginfo=info, compress_level=6)
    return out.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes -> uint8 (H, W, 3) at its own size: the inverse of `encode_png`.  Raises BadPicture."""
    with _named_damage(data):
        return np.array(_open(data, ("PNG",)).convert("RGB"))


def png_text(data: bytes) -> dict[str, str]:
    """The text chunks of a PNG, by key.  Raises BadPicture where the bytes are no whole PNG."""
    with _named_damage(data):
        image = _open(data, ("PNG",))
    return {key: str(value) for key, value in image.text.items()}


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
    """Pictures uint8 (h, w, 3) of one size, row by row -> one uint8 (H, W, 3), white between and around them.

    `row_labels`, one per row, are written at the left of their rows.
    """
    if len(images) == 0 or columns < 1:
        raise ValueError(f"grid of {len(images)} pictures in {columns} columns: need at least one of each")
    height, width = images[0].shape[:2]
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
        place = (margin + gap + column * (width + gap), gap + row * (height + gap))
        canvas.paste(Image.fromarray(np.ascontiguousarray(image)), place)
    return np.array(canvas)
