"""WebP, GIF, BMP, TIFF, and the JPEGs that simplejpeg has no name for: what is decoded by Pillow."""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion.data.pictures.bad_picture import BadPicture, named_damage
from diffusion.data.pictures.opencv import opencv
from diffusion.data.pictures.pixels import check_size, eight_bit

_OPENINGS = {"GIF": rb"GIF8[79]a", "WEBP": rb"RIFF....WEBP", "BMP": rb"BM", "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+"}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _TIFF_TILE, _TIFF_EXTRA = 258, 262, 284, (322, 323), 338


def decode_with_pillow(data: bytes, *, formats: tuple[str, ...] = tuple(_OPENINGS)) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W, 4), upright.  Raises BadPicture."""
    claimed = [name for name, opening in _OPENINGS.items() if re.match(opening, data, re.DOTALL)]
    if formats == tuple(_OPENINGS) and not claimed:
        raise BadPicture("not a picture", f"begins with {data[:8].hex(' ')}: none of the formats expected")
    name = (claimed or formats)[0]
    if name == "WEBP":
        _check_webp(data)
    if name == "TIFF" and data[2:4] in (b"*\0", b"\0*"):
        start = int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big")
        if start >= len(data):
            raise BadPicture("truncated", f"TIFF: {len(data):,} bytes, and the directory at {start:,}")
    with named_damage(name):
        try:
            image = Image.open(io.BytesIO(data), formats=(name,))
        except UnidentifiedImageError as error:
            what = "begins as one, but its header is damaged or of a kind that is not supported"
            raise BadPicture("damaged", f"{name}: {what}") from error
        except Image.DecompressionBombError as error:
            raise BadPicture("too many pixels", f"{name}: {error}") from error
        check_size(*image.size)
        if name == "TIFF":
            check_size(*(image.tag_v2.get(tag, 1) for tag in _TIFF_TILE))
            bits = image.tag_v2.get(_TIFF_BITS, (1,))
            if set(bits) == {16} and image.mode in ("RGB", "RGBA"):
                return _deep_tiff(data, image.tag_v2)
        image.load()
        inverted = name == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0
        return np.array(_eight_bits(ImageOps.exif_transpose(image), inverted))


def _check_webp(data: bytes) -> None:
    """Raises BadPicture: Pillow takes memory for the whole canvas, twice, before it can be asked for the size.

    [RFC 9649: the first chunk is VP8X (canvas less one), VP8L (14 bits each, less one) or VP8 (after its start code)]
    """
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise BadPicture("truncated", f"WEBP: ends after {len(data)} bytes, within its header")
    if len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BadPicture("truncated", f"WEBP: {len(data):,} bytes, where the header says {data[4:8].hex(' ')}")
    if kind == b"VP8X":
        check_size(1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little"))
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        check_size(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    elif kind == b"VP8 ":
        check_size(int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF)


def _eight_bits(image: Image.Image, inverted: bool) -> Image.Image:
    """Any mode -> RGB or RGBA.  inverted: white is 0, which Pillow heeds up to 8 bits."""
    if image.mode == "F":
        raise BadPicture("unsupported pixels", "floating-point values, whose range no file states")
    if not image.mode.startswith("I"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65_535:
        raise BadPicture("unsupported pixels", f"mode {image.mode} with values {values.min()} to {values.max()}")
    values = (65_535 - values if inverted else values).astype(np.uint16)
    return Image.fromarray(eight_bit(values)).convert("RGB")


def _deep_tiff(data: bytes, tags: Mapping[int, Any]) -> np.ndarray:
    """RGB or RGBA of 16 bits a channel, of which Pillow would keep the upper 8 alone."""
    if tags.get(_TIFF_EXTRA, (2,))[0] == 1 or tags.get(_TIFF_PLANAR, 1) != 1:
        what = "multiplied with their alpha" if tags.get(_TIFF_PLANAR, 1) == 1 else "one plane after the other"
        raise BadPicture("unsupported pixels", f"TIFF: channels of 16 bits, {what}")
    cv2 = opencv()
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)  # upright
    if pixels is None:
        raise BadPicture("damaged", "TIFF: the data cannot be decompressed, or ends before the last pixel")
    if pixels.shape[2] == 3 or tags.get(_TIFF_EXTRA, (2,))[0] == 0:  # a fourth channel of no stated meaning
        return eight_bit(pixels[..., 2::-1])
    return eight_bit(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
