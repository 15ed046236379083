"""Picture files that are damaged, or made to harm: each with the kind that must be named.  All made by code."""

import pickle
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.files_by_hand import chunk, noise, png, png_header, saved, tiff
from tests.photographs import photograph

SIDE = 16


class Hostile(NamedTuple):
    name: str
    data: bytes
    kind: str


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _set(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def hostile() -> list[Hostile]:
    pixels = noise(SIDE, SIDE, 3)
    photo = photograph(64, 2)
    whole, jpeg = png(pixels, 8, 2), saved(photo, "JPEG", quality=90)
    progressive, webp = saved(photo, "JPEG", quality=90, progressive=True), saved(photo, "WEBP", lossless=True)
    gif, bmp = saved(Image.fromarray(photo).quantize(), "GIF"), saved(pixels, "BMP")
    lzw, deep = saved(photo, "TIFF", compression="tiff_lzw"), tiff(noise(SIDE, SIDE, 3, below=2**16), deflate=True)
    raw = tiff(pixels)
    scan = jpeg.index(b"\xff\xda")
    size = jpeg.index(b"\xff\xc0") + 5
    idat = whole.index(b"IDAT")

    def chunks(width: int, height: int, body: bytes, *extra: bytes, depth: int = 8, colour: int = 2) -> bytes:
        data = chunk(b"IDAT", zlib.compress(body)) if body is not None else b""
        return png_header(width, height, depth, colour) + b"".join(extra) + data + chunk(b"IEND", b"")

    again = progressive[progressive.rindex(b"\xff\xda") : -2]  # the last scan once more, and once more, ...
    cases = {
        # no pictures at all
        ("empty.png", "empty"): b"",
        ("text.png", "not a picture"): b"just text, named .png",
        ("page.jpg", "not a picture"): b"<!DOCTYPE html><title>404</title>",
        ("drawing.svg.png", "not a picture"): b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
        ("script.eps", "not a picture"): b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        ("document.pdf", "not a picture"): b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
        ("archive.png", "not a picture"): b"PK\3\4" + bytes(60),
        ("program.jpg", "not a picture"): b"\x7fELF" + bytes(60),
        ("pickle.png", "not a picture"): pickle.dumps({"pixels": [1, 2, 3]}),
        ("zeros.png", "not a picture"): bytes(1000),
        ("array.png", "not a picture"): b"\x93NUMPY\1\0" + bytes(100),
        ("photo.heic", "not a picture"): b"\0\0\0\x18ftypheic" + bytes(100),
        ("icon.ico", "not a picture"): saved(Image.new("RGB", (16, 16)), "ICO"),
        ("old.ppm", "not a picture"): b"P6 2 2 255\n" + bytes(12),
        ("one-byte.jpg", "not a picture"): b"\xff",
        # cut off
        ("signature.png", "truncated"): whole[:8],
        ("header.png", "truncated"): whole[:33],
        ("half.png", "truncated"): _cut(whole, 0.5),
        ("without-end.png", "truncated"): whole[:-12],
        ("last-byte.png", "truncated"): whole[:-1],
        ("too-few-rows.png", "damaged"): chunks(SIDE, SIDE, bytes(100)),
        ("no-data.png", "damaged"): chunks(SIDE, SIDE, None),
        ("half.jpg", "truncated"): _cut(jpeg, 0.5),
        ("half-progressive.jpg", "truncated"): _cut(progressive, 0.5),
        ("half-and-ended.jpg", "truncated"): _cut(jpeg, 0.5) + b"\xff\xd9",
        ("without-end.jpg", "truncated"): jpeg[:-2],
        ("header.jpg", "truncated"): jpeg[:20],
        ("no-scan.jpg", "truncated"): jpeg[:scan],
        ("half.webp", "truncated"): _cut(webp, 0.5),
        ("header.webp", "truncated"): webp[:16],
        ("half.gif", "truncated"): _cut(gif, 0.7),
        ("header.gif", "damaged"): gif[:8],
        ("half.bmp", "truncated"): _cut(bmp, 0.5),
        ("header.bmp", "damaged"): bmp[:10],
        ("half.tif", "truncated"): _cut(lzw, 0.5),
        ("half-raw.tif", "truncated"): _cut(raw, 0.5),
        ("header.tif", "truncated"): lzw[:8],
        # changed
        ("flipped-data.png", "damaged"): _set(whole, idat + 40, b"\xff\0\xff"),
        ("flipped-header.png", "damaged"): _set(whole, 19, b"\x09"),
        ("flipped-checksum.png", "damaged"): _set(whole, len(whole) - 1, b"\0"),
        ("two-headers.png", "damaged"): png_header(4, 4) + whole[8:],
        ("no-header.png", "damaged"): whole[:8] + whole[33:],
        ("no-palette.png", "damaged"): chunks(4, 1, bytes(5), colour=3),
        ("bad-depth.png", "damaged"): chunks(4, 1, bytes(99), depth=3),
        ("bad-colour.png", "damaged"): chunks(4, 1, bytes(99), colour=5),
        ("bad-filter.png", "damaged"): chunks(4, 1, b"\x09" + bytes(12)),
        ("bad-stream.png", "damaged"): png_header(4, 1) + chunk(b"IDAT", b"no zlib") + chunk(b"IEND", b""),
        ("no-pixels.png", "damaged"): chunks(0, 4, bytes(9)),
        ("huge-chunk.png", "truncated"): whole[:33] + b"\xff\xff\xff\xff" + whole[37:],
        ("flipped-data.jpg", "damaged"): _set(jpeg, scan + 300, b"\xff\xff\xc4\xff"),
        ("bad-table.jpg", "damaged"): jpeg.replace(b"\xff\xc4\0\x1f", b"\xff\xc4\0\x03", 1),
        ("no-tables.jpg", "damaged"): jpeg.replace(b"\xff\xdb", b"\xff\xec"),
        ("flipped-data.webp", "damaged"): _set(webp, 24, bytes(60)),
        ("flipped-data.tif", "damaged"): _set(lzw, 400, bytes(100)),
        ("flipped-deep.tif", "damaged"): _set(deep, 20, bytes(30)),
        ("directory-outside.tif", "truncated"): _set(raw, 4, struct.pack("<I", 2**31)),
        ("strips-outside.tif", "truncated"): tiff(pixels, tags=[(273, 4, [2**31] * SIDE)]),
        # too much
        ("claims.png", "too many pixels"): chunks(9_000, 9_000, bytes(1000)),
        ("claims-more.png", "too many pixels"): chunks(2**31 - 1, 2**31 - 1, bytes(1000)),
        ("bomb.png", "too many pixels"): chunks(50_000, 50_000, bytes(2**24)),
        ("claims.jpg", "too many pixels"): _set(jpeg, size, struct.pack(">HH", 65_500, 65_500)),
        ("scans.jpg", "too many pixels"): progressive[:-2] + again * 500 + b"\xff\xd9",
        ("claims.gif", "too many pixels"): _set(gif, 6, struct.pack("<HH", 65_535, 65_535)),
        ("claims.bmp", "too many pixels"): _set(bmp, 18, struct.pack("<ii", 100_000, 100_000)),
        ("claims.tif", "too many pixels"): tiff(pixels, tags=[(256, 4, [100_000]), (257, 4, [100_000])]),
        ("tiles.tif", "too many pixels"): tiff(pixels, tile=16, tags=[(322, 4, [2**20]), (323, 4, [2**20])]),
        ("claims.webp", "too many pixels"): _webp(
            b"VP8L", b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + bytes(9)
        ),
        ("canvas.webp", "too many pixels"): _webp(b"VP8X", bytes(4) + b"\xff\xff\xff" * 2),
        # pixels of no stated meaning
        ("float.tif", "unsupported pixels"): saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
        ("wide.tif", "unsupported pixels"): saved(Image.fromarray(np.full((2, 2), 2**20, np.int32)), "TIFF"),
        ("multiplied.tif", "unsupported pixels"): tiff(noise(4, 4, 4, below=2**16), extra=[1]),
        ("deep-planes.tif", "unsupported pixels"): tiff(noise(4, 4, 3, below=2**16), planes=True),
    }
    return [Hostile(name, data, kind) for (name, kind), data in cases.items()]


def _webp(kind: bytes, body: bytes) -> bytes:
    part = kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(part) + 4) + b"WEBP" + part
