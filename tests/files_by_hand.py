"""Picture files for the tests: PNG and TIFF written by hand, byte by byte, for what no library writes; and by Pillow."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def saved(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def noise(*shape: int, below: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=np.uint16 if below > 256 else np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    )


def png(
    samples: np.ndarray, depth: int, colour: int, *chunks: bytes, interlaced: bool = False, after: bytes = b""
) -> bytes:
    """samples (H, W, channels), each below 2^depth."""

    def rows(part: np.ndarray) -> bytes:
        if depth == 16:
            return b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)
        bits = np.unpackbits(part.astype(np.uint8).reshape(len(part), -1, 1), axis=2)[..., 8 - depth :]
        return b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in bits)

    passes = [samples[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [samples]
    data = zlib.compress(b"".join(rows(part) for part in passes if part.size))
    head = png_header(samples.shape[1], samples.shape[0], depth, colour, int(interlaced))
    return head + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"") + after


def rgb(grey: np.ndarray) -> np.ndarray:
    """(H, W, 1) -> (H, W, 3)."""
    return np.repeat(grey, 3, axis=2)


def to_eight(samples: np.ndarray, depth: int) -> np.ndarray:
    """0 .. 2^depth - 1 -> 0 .. 255, rounded to the nearest."""
    return np.floor(samples.astype(float) * 255 / (2**depth - 1) + 0.5).astype(np.uint8)


def with_alpha(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, alpha.astype(np.uint8)])


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def tiff(
    samples: np.ndarray,
    *,
    order: str = "<",
    photometric: int = 2,
    deflate: bool = False,
    tile: int = 0,
    extra: Sequence[int] = (),
    planes: bool = False,
    tags: Sequence[tuple[int, int, list[int]]] = (),
) -> bytes:
    """samples (H, W, channels), uint8 or uint16."""
    height, width, channels = samples.shape
    values = samples.astype(samples.dtype.newbyteorder(order))
    if tile:
        padded = np.pad(values, ((0, -height % tile), (0, -width % tile), (0, 0)))
        parts = [
            padded[y : y + tile, x : x + tile].tobytes() for y in range(0, height, tile) for x in range(0, width, tile)
        ]
    else:
        parts = [values[..., c].tobytes() for c in range(channels)] if planes else [row.tobytes() for row in values]
    parts = [zlib.compress(part) for part in parts] if deflate else parts
    offsets, sizes = [8 + sum(map(len, parts[:i])) for i in range(len(parts))], [len(part) for part in parts]
    fields = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [samples.dtype.itemsize * 8] * channels),
        (259, 3, [8 if deflate else 1]),
        (262, 3, [photometric]),
        (277, 3, [channels]),
        (284, 3, [2 if planes else 1]),
        (324 if tile else 273, 4, offsets),
        (325 if tile else 279, 4, sizes),
        *([(322, 4, [tile]), (323, 4, [tile])] if tile else [(278, 4, [height if planes else 1])]),
        *([(338, 3, list(extra))] if extra else []),
    ]
    given = {tag for tag, _, _ in tags}
    fields = sorted([field for field in fields if field[0] not in given] + list(tags))
    start = 8 + sum(sizes)
    beyond = start + 2 + 12 * len(fields) + 4
    entries, more = b"", b""
    for tag, kind, numbers in fields:
        raw = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(raw) > 4:
            raw, more = struct.pack(f"{order}I", beyond + len(more)), more + raw
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + raw.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + b"".join(parts) + struct.pack(f"{order}H", len(fields)) + entries + bytes(4) + more
