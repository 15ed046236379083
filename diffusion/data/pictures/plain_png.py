"""PNGs of drawings as `encode_png` writes them, small and many: unpacked by zlib alone, in half the time of OpenCV.

Most of what a decoder of any PNG does for a picture of 32 or 64 pixels is not the pixels: it sets itself up, and takes
everything down.  Where nothing is filtered, the pixels are what zlib unpacks, with a 0 before each line; so one copy moves
those of many pictures.  Whatever is not exactly so is left to others, who also name what is damaged.  [PNG, sections 7, 9]
"""

import struct
from collections.abc import Sequence
from zlib import crc32, decompressobj
from zlib import error as ZlibError

import numpy as np

from diffusion.data.pictures import png

_END = struct.pack(">I4sI", 0, b"IEND", crc32(b"IEND"))
_RUN = 2**18  # bytes unpacked before they are copied: they are in the processor's caches still


def decode_plain(pictures: Sequence[bytes | memoryview], out: np.ndarray, places: Sequence[int]) -> list[int]:
    """Those PNGs that are whole and plain into these rows of `out`, uint8 (B, H, W, 3), C-contiguous, that are theirs.

    Returns which of the pictures are not, by their numbers; of their rows nothing, or all that is theirs, is written.
    """
    _, height, width, _ = out.shape
    start, size = png.plain_start(height, width), height * (3 * width + 1)
    window = min(size, 2**15)  # the longest way back that deflate knows, or all there is
    left: list[int] = []
    numbers: list[int] = []
    unpacked: list[bytes] = []
    for number, data in enumerate(pictures):
        data = bytes(data)
        packed = len(data) - 57  # bytes of pixels, where there is one chunk of them and no other
        # bits 6 and 7 of the 43rd byte say how hard a packer tried: hard where nothing is filtered, as we write
        if (
            packed > 2
            and data[42] & 0xC0 == 0x80
            and 256 << (data[41] >> 4) >= window  # else it could reach farther back than it says it does
            and data.startswith(start)
            and data[33:41] == struct.pack(">I4s", packed, b"IDAT")
            and data.endswith(_END)
            and crc32(data[37:-16]) == int.from_bytes(data[-16:-12], "big")
        ):
            unpacking = decompressobj(0)
            try:
                lines = unpacking.decompress(data[41:-16], size)  # no more, however much there is
            except ZlibError:
                lines = b""
            if len(lines) == size and unpacking.eof and not unpacking.unused_data:
                numbers.append(number)
                unpacked.append(lines)
                if len(numbers) * size >= _RUN:
                    left += _copied(unpacked, numbers, out, places)
                    numbers, unpacked = [], []
                continue
        left.append(number)
    if numbers:
        left += _copied(unpacked, numbers, out, places)
    return left


def _copied(unpacked: list[bytes], numbers: list[int], out: np.ndarray, places: Sequence[int]) -> list[int]:
    """The lines of pictures of these numbers into their rows, less the filter before each.  Returns the numbers of those
    that are filtered."""
    batch, height, width, _ = out.shape
    lines = np.frombuffer(b"".join(unpacked), np.uint8).reshape(len(numbers), height, 3 * width + 1)
    filtered = lines[:, :, 0].any(1).tolist()
    rows = out.reshape(batch, height, 3 * width)
    if not any(filtered):
        rows[[places[number] for number in numbers]] = lines[:, :, 1:]
        return []
    for n, number in enumerate(numbers):
        if not filtered[n]:
            rows[places[number]] = lines[n, :, 1:]
    return [number for n, number in enumerate(numbers) if filtered[n]]
