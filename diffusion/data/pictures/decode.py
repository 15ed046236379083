"""Bytes of a picture file -> all its pixels, upright: RGB or RGBA, uint8.

Each format has one decoder, so that a picture has one meaning and every damage a name (`decode_plain` takes a short cut to
the same pixels):

| format | decoder | |
|---|---|---|
| PNG | OpenCV | every chunk's checksum is compared first; 16 bits to 8 rounded; transparency of every kind |
| JPEG | simplejpeg | baseline and progressive, grey, RGB, CMYK and YCCK; what libjpeg only warns of is damage |
| WebP, GIF, BMP, TIFF | Pillow | the first frame or page; TIFF of 16 bits and several channels: OpenCV |

Colour profiles are ignored, and CMYK becomes RGB as (1 - C)(1 - K).  EXIF orientation is applied.  Pixels are counted
before any are decoded.  Nothing else is opened: no format that can hold a program.
"""

import struct
from collections.abc import Sequence

import numpy as np
import simplejpeg

from diffusion.data.pictures import png
from diffusion.data.pictures.bad_picture import BadPicture, named_damage
from diffusion.data.pictures.opencv import opencv
from diffusion.data.pictures.pixels import check_size, eight_bit, orientation, upright
from diffusion.data.pictures.plain_png import decode_plain
from diffusion.data.pictures.with_pillow import decode_with_pillow

MAX_SCANS = 100  # of a progressive JPEG, each of which is decoded over all pixels: usual are ten
_JPEG = b"\xff\xd8\xff"
_HEADER = 26  # bytes of a PNG up to where its size, depth and colours are told
_UNDECODABLE = "the data cannot be decompressed, or ends before the last pixel"


def decode_all(data: bytes) -> np.ndarray:
    """A picture file's bytes -> uint8 (H, W, 3) or (H, W, 4), as the module says.

    Raises BadPicture of kind: empty, not a picture, too many pixels, truncated, damaged, unsupported pixels.
    """
    if not data:
        raise BadPicture("empty", "the file has no bytes")
    if data.startswith(png.SIGNATURE):
        return _decode_png(data)
    if data.startswith(_JPEG):
        return _decode_jpeg(data)
    return decode_with_pillow(data)


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes -> uint8 (H, W, 3) at its own size: the inverse of `encode_png`.  Raises BadPicture."""
    if not data.startswith(png.SIGNATURE):
        raise BadPicture("not a picture", f"begins with {data[:8].hex(' ')}: no PNG")
    return np.ascontiguousarray(_decode_png(data)[..., :3])


def decode_into(data: bytes | memoryview, out: np.ndarray) -> None:
    """A picture of a shard, 8-bit RGB PNG or JPEG, into `out`: uint8 (H, W, 3), C-contiguous, such as a row of a batch.

    Two threads decode twice as much: the decoders release Python's lock.  Raises BadPicture where the bytes are
    damaged, of another shape than `out` or no such file; `out` is undefined then.
    """
    if bad := decode_rows((data,), out[None], (0,)):
        raise bad[0]


def decode_rows(
    pictures: Sequence[bytes | memoryview], out: np.ndarray, places: Sequence[int], *, known: bool = False
) -> dict[int, BadPicture]:
    """Pictures as `decode_into` takes them into these rows of `out`: uint8 (B, H, W, 3), C-contiguous.  known: as for
    `decode_plain`.

    Returns what is wrong with those that are bad, by place; their rows are undefined.  A thread holds Python's lock for a
    few microseconds a picture, so that others, which decode small ones at the same time, seldom wait for it.
    """
    if out.dtype != np.uint8 or out.ndim != 4 or out.shape[3] != 3 or not out.flags.c_contiguous:
        raise ValueError(f"pictures are decoded into uint8 (..., H, W, 3), contiguous, not {out.dtype} {out.shape}")
    _, height, width, _ = out.shape
    cv2 = opencv()
    imdecode, flags = cv2.imdecode, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    header = png.plain_start(height, width)[:_HEADER]
    size, rows, bad = height * width * 3, memoryview(out.reshape(-1)), {}
    for number in decode_plain(pictures, out, places, known=known):
        data, place = pictures[number], places[number]
        if data[:_HEADER] == header:
            pixels = imdecode(np.frombuffer(data, np.uint8), flags)
            if pixels is not None:
                # numpy's own copy would let go of Python's lock, and take it again, for a microsecond's work
                rows[place * size : place * size + size] = pixels.reshape(-1).data
                continue
        try:
            _checked_into(data, out[place])
        except BadPicture as error:
            bad[place] = error
    return bad


def _checked_into(data: bytes | memoryview, out: np.ndarray) -> None:
    """A JPEG into `out`, (H, W, 3); of a PNG, what is wrong with it."""
    if data[:3] == _JPEG:
        _jpeg_into(data, out)
    elif data[:8] != png.SIGNATURE:
        raise BadPicture("not a picture", f"begins with {bytes(data[:8]).hex(' ')}: neither PNG nor JPEG")
    elif len(data) < 33:
        raise BadPicture("truncated", f"a PNG of {len(data)} bytes")
    elif data[:_HEADER] != png.plain_start(*out.shape[:2])[:_HEADER]:
        width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
        what = f"a PNG of {width} x {height} pixels, bit depth {depth}, colour type {colour}"
        raise BadPicture("wrong shape", f"{what}, where 8-bit RGB of {out.shape[1]} x {out.shape[0]} is expected")
    else:
        raise BadPicture("damaged", _UNDECODABLE)


def _jpeg_into(data: bytes | memoryview, out: np.ndarray) -> None:
    with named_damage("JPEG"):
        pixels = simplejpeg.decode_jpeg(data, buffer=out)
    if pixels.shape != out.shape:
        raise BadPicture("wrong shape", f"a JPEG of {pixels.shape}, where {out.shape} is expected")


def _by_opencv(data: bytes | memoryview, flags: int) -> np.ndarray:
    pixels = opencv().imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise BadPicture("damaged", _UNDECODABLE)
    return pixels


def _decode_png(data: bytes) -> np.ndarray:
    file = png.parse(data)
    check_size(file.width, file.height)
    cv2 = opencv()
    if file.alpha:
        pixels = cv2.cvtColor(_by_opencv(file.data, cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA)
    else:
        deep = cv2.IMREAD_ANYDEPTH if file.depth == 16 else 0
        pixels = _by_opencv(file.data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | deep)
    if file.clear_grey is not None:  # which OpenCV passes over
        level = file.clear_grey * (255 // (2**file.depth - 1) if file.depth < 8 else 1)
        pixels = np.dstack([eight_bit(pixels), np.where(pixels[..., 0] == level, 0, 255).astype(np.uint8)])
    return upright(eight_bit(pixels), orientation(file.exif))


def _decode_jpeg(data: bytes) -> np.ndarray:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        if b"\xff\xda" not in data:
            raise BadPicture("truncated", "JPEG: ends before its first scan") from error
        # a header that simplejpeg refuses and Pillow may not: an unusual subsampling, a later version of JFIF
        return decode_with_pillow(data, formats=("JPEG",))
    check_size(width, height)
    if (scans := _scans(data)) > MAX_SCANS:
        raise BadPicture("too many pixels", f"{width} x {height} are decoded over and over, in {scans} scans")
    with named_damage("JPEG"):
        if colours in ("CMYK", "YCCK"):
            ink = simplejpeg.decode_jpeg(data, colorspace="CMYK")  # 255 is no ink, as Adobe writes it
            # rounded as Pillow does: the product of two shares of 255
            product = ink[..., :3].astype(np.uint32) * ink[..., 3:] + 128
            pixels = ((product + (product >> 8)) >> 8).astype(np.uint8)
        else:
            pixels = simplejpeg.decode_jpeg(data)
    return upright(pixels, orientation(_exif_of_jpeg(data)))


def _scans(data: bytes) -> int:
    """How often a scan may begin: where the bytes of the marker stand, counted in a third of `bytes.count`'s time."""
    values = np.frombuffer(data, np.uint8)
    return np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA))


def _exif_of_jpeg(data: bytes) -> bytes:
    """The EXIF block, "" where there is none before the first scan."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        size = int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            return data[place + 10 : place + 2 + size]
        place += 2 + size if data[place + 1] != 0xFF else 1  # markers may be preceded by fill bytes
    return b""
