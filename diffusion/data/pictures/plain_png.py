"""PNGs of drawings, small and many: packed by zlib alone, and dozens unpacked at once, in a third of the time of OpenCV.

Most of what a decoder of any PNG does for a picture of 32 or 64 pixels is not the pixels: it sets itself up, and takes
everything down, and threads hand Python's lock to each other for each.  Where nothing is filtered, the pixels are what
zlib unpacks, with a 0 before each line; so one copy moves those of many pictures.  And where the packed lines end with a
flush, on a whole byte, those of many pictures are, one behind the other, one stream.  Whatever is not exactly so is left
to others, who also name what is damaged.  zlib-ng unpacks in three quarters of zlib's time; zlib itself packs, so that the
bytes of shards stay what they were.  [PNG, sections 7, 9; RFC 1951, 3.2.4]
"""

import struct
from collections.abc import Sequence
from functools import cache
from zlib import Z_SYNC_FLUSH, compressobj

import numpy as np
from zlib_ng.zlib_ng import adler32, crc32, decompressobj
from zlib_ng.zlib_ng import error as ZlibError

from diffusion.data.pictures import png
from diffusion.data.pictures.sums import sum_of

_HEAD = struct.Struct(">33sI4sH")  # signature and header; length and kind of the next chunk; how zlib's stream begins
_TAIL = struct.Struct(">I12s")  # sum of that chunk; the end
_END = struct.pack(">I4sI", 0, b"IEND", crc32(b"IEND"))
_AROUND = _HEAD.size - 2 + _TAIL.size  # bytes of a PNG that has its pixels in one chunk, besides them
_FLUSHED = b"\0\0\xff\xff"  # how what is flushed ends: with a block of nothing
_LAST = b"\3\0"  # another one that says it is the last
_FARTHEST = 15  # bits of the longest way back that deflate knows
_RUN = 2**18  # bytes unpacked before they are copied: they are in the processor's caches still


def encode_plain(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> PNG bytes that `decode_plain` takes, by the lines' repeats."""
    height, width, _ = pixels.shape
    lines = np.zeros((height, 3 * width + 1), np.uint8)
    lines[:, 1:] = pixels.reshape(height, 3 * width)
    # the shortest way back that reaches all lines: its tables are made anew each time; 262 bytes of it are never used
    packing = compressobj(6, wbits=min(max((lines.size + 261).bit_length(), 9), _FARTHEST))
    chunk = b"".join((b"IDAT", packing.compress(lines), packing.flush(Z_SYNC_FLUSH), packing.flush()))
    size, total = struct.pack(">I", len(chunk) - 4), struct.pack(">I", crc32(chunk))
    return b"".join((png.plain_start(height, width), size, chunk, total, _END))


def decode_plain(
    pictures: Sequence[bytes | memoryview], out: np.ndarray, places: Sequence[int], *, known: bool = False
) -> list[int]:
    """Those PNGs that are whole and plain into these rows of `out`, uint8 (B, H, W, 3), C-contiguous, that are theirs.
    known: their bytes are those that a shard's index has the sum of, so that of their chunk is not taken as well.

    Returns which of the pictures are not, by their numbers; of their rows nothing, or all that is theirs, is written.
    """
    _, height, width, _ = out.shape
    start, size = png.plain_start(height, width), height * (3 * width + 1)
    left: list[int] = []
    numbers: list[int] = []
    streams: list[memoryview] = []
    for number, data in enumerate(pictures):
        stream = _stream(memoryview(data), start, size, known)
        if stream is None:
            left.append(number)
            continue
        numbers.append(number)
        streams.append(stream)
        if len(numbers) * size >= _RUN:
            left += _unpacked(streams, numbers, out, places)
            numbers, streams = [], []
    return left + _unpacked(streams, numbers, out, places) if numbers else left


def _stream(data: memoryview, start: bytes, size: int, known: bool) -> memoryview | None:
    """What zlib packed, where a PNG begins so and has one chunk of it, undamaged, and no other chunk."""
    packed = len(data) - _AROUND
    if packed <= 2:
        return None
    begin, length, kind, header = _HEAD.unpack_from(data)
    total, end = _TAIL.unpack_from(data, len(data) - _TAIL.size)
    if (
        header in _headers(size)
        and begin == start
        and length == packed
        and kind == b"IDAT"
        and end == _END
        and (known or sum_of(data[37 : -_TAIL.size], crc32) == total)
    ):
        return data[41 : -_TAIL.size]
    return None


@cache
def _headers(size: int) -> frozenset[int]:
    """How zlib's streams of `size` bytes may begin.  [RFC 1950, 2.2]"""
    # a window that reaches all bytes there are, else a stream could reach farther back than it says it does
    windows = (bits for bits in range(8, _FARTHEST + 1) if 2**bits >= min(size, 2**_FARTHEST))
    # bits 6 and 7 of the second byte say how hard a packer tried: hard where nothing is filtered, as we write
    return frozenset(
        both for bits in windows for low in range(0x80, 0xA0) if (both := (bits - 8 << 4 | 8) << 8 | low) % 31 == 0
    )


def _unpacked(streams: list[memoryview], numbers: list[int], out: np.ndarray, places: Sequence[int]) -> list[int]:
    """What zlib packed of pictures of these numbers into their rows.  Returns the numbers of those that are not plain."""
    batch, height, width, _ = out.shape
    size = height * (3 * width + 1)
    lines, left = _at_once(streams, size), []
    if lines is None:
        alone = [_alone(stream, size) for stream in streams]
        left = [number for number, own in zip(numbers, alone, strict=True) if own is None]
        numbers = [number for number, own in zip(numbers, alone, strict=True) if own is not None]
        lines = b"".join(own for own in alone if own is not None)
    shaped = np.frombuffer(lines, np.uint8).reshape(len(numbers), height, 3 * width + 1)
    rows = out.reshape(batch, height, 3 * width)
    filtered = shaped[:, :, 0].any(1).tolist()  # told by what stands before each line
    if not any(filtered):
        rows[[places[number] for number in numbers]] = shaped[:, :, 1:]
        return left
    for n, number in enumerate(numbers):
        if filtered[n]:
            left.append(number)
        else:
            rows[places[number]] = shaped[n, :, 1:]
    return left


def _at_once(streams: list[memoryview], size: int) -> bytes | None:
    """The lines of pictures, `size` bytes of each, where all of their streams can be one; None to have each decide alone.

    Within one stream a picture could reach back to the pixels of another: it shows in the sum of its own.
    """
    if len(streams) < 2 or not all(stream[-10:-4] == _FLUSHED + _LAST for stream in streams):
        return None
    unpacking = decompressobj(-_FARTHEST)
    try:
        lines = unpacking.decompress(b"".join([*(stream[2:-6] for stream in streams), _LAST]), len(streams) * size)
    except ZlibError:
        return None
    if len(lines) != len(streams) * size or not unpacking.eof or unpacking.unused_data:
        return None
    view = memoryview(lines)
    for n, stream in enumerate(streams):
        if sum_of(view[n * size : (n + 1) * size], adler32, 1) != int.from_bytes(stream[-4:], "big"):
            return None
    return lines


def _alone(stream: memoryview, size: int) -> bytes | None:
    """The lines of one picture; None where they are not `size` bytes, or their sum is another."""
    unpacking = decompressobj(0)
    try:
        lines = unpacking.decompress(stream, size)  # no more, however much there is
    except ZlibError:
        return None
    return lines if len(lines) == size and unpacking.eof and not unpacking.unused_data else None
