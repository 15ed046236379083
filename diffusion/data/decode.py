"""Bytes of a picture file -> pixels."""

import os
import re
import struct
from functools import cache
from types import ModuleType

import numpy as np
import simplejpeg

_PNG_OPENING = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
_JPEG_OPENING = b"\xff\xd8"


@cache
def opencv() -> ModuleType:
    """cv2, without what its import does to the process: it would extend LD_LIBRARY_PATH for every child process, start
    as many threads as there are cores for one picture, and write what it thinks of damaged files to stderr.
    """
    path = os.environ.get("LD_LIBRARY_PATH")
    import cv2

    if path is None:
        os.environ.pop("LD_LIBRARY_PATH", None)
    else:
        os.environ["LD_LIBRARY_PATH"] = path
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


class BadPicture(ValueError):
    """A file that cannot be used.  `kind` is one of a few words to count by, `detail` is for people."""

    def __init__(self, kind: str, detail: str) -> None:
        # the decoder's messages may hold addresses of objects: the same file must give the same reason everywhere
        self.kind, self.detail = kind, re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", detail)
        super().__init__(f"{kind}: {self.detail}")

    def __reduce__(self) -> tuple:
        return type(self), (self.kind, self.detail)


def decode_into(data: bytes | memoryview, out: np.ndarray) -> None:
    """A picture of a shard, 8-bit RGB PNG or JPEG, into `out`: uint8 (H, W, 3), C-contiguous, such as a row of a batch.

    Two threads decode twice as much: the decoders release the GIL.  Raises BadPicture where the bytes are damaged, of
    another shape than `out` or no such file; `out` is undefined then.
    """
    if out.dtype != np.uint8 or out.ndim != 3 or out.shape[2] != 3 or not out.flags.c_contiguous:
        raise ValueError(f"decode_into writes uint8 (H, W, 3), contiguous, not {out.dtype} {out.shape}")
    if data[:16] == _PNG_OPENING:
        _png_into(data, out)
    elif data[:2] == _JPEG_OPENING:
        _jpeg_into(data, out)
    else:
        raise BadPicture("not a picture", f"begins with {bytes(data[:8]).hex(' ')}: neither PNG nor JPEG")


def _png_into(data: bytes | memoryview, out: np.ndarray) -> None:
    if len(data) < 33:
        raise BadPicture("truncated", f"a PNG of {len(data)} bytes")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if (height, width, depth, colour) != (*out.shape[:2], 8, 2):
        what = f"a PNG of {width} x {height} pixels, bit depth {depth}, colour type {colour}"
        raise BadPicture("wrong shape", f"{what}, where 8-bit RGB of {out.shape[1]} x {out.shape[0]} is expected")
    cv2 = opencv()
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise BadPicture("damaged", "the PNG's data cannot be decompressed")
    out[...] = pixels


def _jpeg_into(data: bytes | memoryview, out: np.ndarray) -> None:
    try:
        pixels = simplejpeg.decode_jpeg(data, buffer=out)
    except ValueError as error:
        raise BadPicture("damaged", f"JPEG: {error}") from error
    if pixels.shape != out.shape:
        raise BadPicture("wrong shape", f"a JPEG of {pixels.shape}, where {out.shape} is expected")
