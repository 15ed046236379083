"""What holds of pixels whatever format they came in: how many there may be, 16 bits to 8, and which way is up."""

import struct

import numpy as np

from diffusion.data.pictures.bad_picture import BadPicture

MAX_PIXELS = 2**26  # 8192 x 8192: a file of kilobytes can claim more than a machine has memory


def check_size(width: int, height: int) -> None:
    """Raises BadPicture for more pixels than MAX_PIXELS, or none."""
    if width * height > MAX_PIXELS:
        raise BadPicture("too many pixels", f"{width} x {height} is more than the limit of {MAX_PIXELS:,} pixels")
    if width < 1 or height < 1:
        raise BadPicture("damaged", f"{width} x {height} pixels")


def eight_bit(pixels: np.ndarray) -> np.ndarray:
    """uint16, 0..65535 -> uint8, 0..255, rounded to the nearest; uint8 as it is."""
    if pixels.dtype == np.uint8:
        return pixels
    return ((pixels.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)


def orientation(exif: bytes) -> int:
    """1 to 8: how the camera was held; 1, upright, where the block is absent, damaged or says nothing of it.

    [EXIF 2.3, tag 0x0112 in the first directory of a TIFF structure]
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
            if (tag, kind) == (0x0112, 3) and 1 <= value <= 8:
                return value
    except struct.error:  # points behind its end
        return 1
    return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored -> as seen, by EXIF's 1 to 8: first mirrored along the diagonal, then left-right, up-down."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
