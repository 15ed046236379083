"""Picture files as the world has them: odd but right, damaged, and made to harm.  All made by code, the same each time.

`odd()` are right: each with the pixels it must give.  `hostile()` are not: each with the kind that must be named.
"""

import io
import pickle
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.photographs import photograph

SIDE = 16
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


class Odd(NamedTuple):
    name: str
    data: bytes
    pixels: np.ndarray  # uint8 (H, W, 3 or 4)
    within: int = 0  # levels: of what is lossy


class Hostile(NamedTuple):
    name: str
    data: bytes
    kind: str


def saved(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def noise(*shape: int, below: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=np.uint16 if below > 256 else np.uint8)


# ---------------------------------------------------------------------------------------------------------- PNG by hand
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


def _odd_pngs() -> Iterator[Odd]:
    for depth in (1, 2, 4, 8, 16):
        grey = noise(9, 13, 1, below=2**depth, seed=depth)
        for interlaced in (False, True):
            name = f"grey-{depth}{'-interlaced' if interlaced else ''}"
            yield Odd(f"{name}.png", png(grey, depth, 0, interlaced=interlaced), rgb(to_eight(grey, depth)))
        key = int(grey[3, 4, 0])
        keyed = with_alpha(rgb(to_eight(grey, depth)), np.where(grey[..., 0] == key, 0, 255))
        yield Odd(f"grey-{depth}-key.png", png(grey, depth, 0, chunk(b"tRNS", struct.pack(">H", key))), keyed)
    for depth in (1, 2, 4, 8):
        index, palette = noise(9, 13, 1, below=2**depth, seed=depth), noise(2**depth, 3, seed=90)
        plte, alpha = chunk(b"PLTE", palette.tobytes()), noise(2**depth // 2, seed=91)
        pixels = palette[index[..., 0]]
        yield Odd(f"palette-{depth}.png", png(index, depth, 3, plte), pixels)
        table = np.concatenate([alpha, np.full(2**depth - len(alpha), 255, np.uint8)])  # those not listed are opaque
        see_through = with_alpha(pixels, table[index[..., 0]])
        yield Odd(
            f"palette-{depth}-alpha.png", png(index, depth, 3, plte, chunk(b"tRNS", alpha.tobytes())), see_through
        )
    for depth in (8, 16):
        for colour, channels in ((2, 3), (4, 2), (6, 4)):
            samples = noise(9, 13, channels, below=2**depth, seed=channels)
            pixels = to_eight(samples, depth)
            if channels == 2:
                pixels = with_alpha(rgb(pixels[..., :1]), pixels[..., 1])
            for interlaced in (False, True):
                name = f"colour-{colour}-{depth}{'-interlaced' if interlaced else ''}.png"
                yield Odd(name, png(samples, depth, colour, interlaced=interlaced), pixels)
        samples = noise(9, 13, 3, below=2**depth, seed=3)
        key = samples[2, 5]
        keyed = with_alpha(to_eight(samples, depth), np.where((samples == key).all(2), 0, 255))
        trns = chunk(b"tRNS", key.astype(">u2").tobytes())
        yield Odd(f"rgb-{depth}-key.png", png(samples, depth, 2, trns), keyed)
    pixels = noise(9, 13, 3)
    bomb = zlib.compress(bytes(2**24), 9)  # 16 MiB of text in 16 KiB
    texts = {
        "text-bomb": chunk(b"zTXt", b"Comment\0\0" + bomb),
        "text-bomb-international": chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        "profile-bomb": chunk(b"iCCP", b"icc\0\0" + bomb),
        "text-long": chunk(b"tEXt", b"Comment\0" + b"x" * 2**20),
        "unknown-chunk": chunk(b"prVt", b"whatever"),
        "gamma": chunk(b"gAMA", struct.pack(">I", 100_000)),
        "bad-exif": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
        "bad-profile": chunk(b"iCCP", b"no profile"),
    }
    for name, extra in texts.items():
        yield Odd(f"{name}.png", png(pixels, 8, 2, extra), pixels)
    yield Odd("trailing.png", png(pixels, 8, 2, after=b"PK\3\4 and more" * 50), pixels)
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    yield Odd("exif-turned.png", png(pixels, 8, 2, chunk(b"eXIf", exif)), np.rot90(pixels, -1))
    still = chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(
        b"fcTL", struct.pack(">IIIIIHHBB", 0, 13, 9, 0, 0, 1, 10, 0, 0)
    )
    frame = chunk(b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(9 * 40)))
    yield Odd("animated.png", png(pixels, 8, 2, still, frame), pixels)


# ------------------------------------------------------------------------------------------------------------ JPEG
def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As stored -> as seen  [EXIF 2.3, tag 0x0112]."""
    back = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}[orientation]
    out = np.rot90(pixels, back)
    return out[:, ::-1] if orientation in (2, 4, 5, 7) else out


def _odd_jpegs() -> Iterator[Odd]:
    photo = photograph(40, 3)[:, :33]
    image = Image.fromarray(photo)
    for name, options in {
        "baseline": {},
        "progressive": {"progressive": True},
        "420": {"subsampling": 2},
        "422": {"subsampling": 1},
        "444": {"subsampling": 0},
        "411": {"subsampling": "4:1:1"},
        "restarts": {"restart_marker_blocks": 2},
        "rgb": {"keep_rgb": True},
        "worst": {"quality": 1},
        "comment": {"comment": b"x" * 60_000},
        "profile": {"icc_profile": b"no profile" * 9_000},
    }.items():
        data = saved(image, "JPEG", **{"quality": 90} | options)
        yield Odd(f"{name}.jpg", data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    plain = saved(image, "JPEG", quality=90)
    pixels = np.asarray(Image.open(io.BytesIO(plain)))
    yield Odd("trailing.jpg", plain + b"garbage" * 100, pixels)
    yield Odd("thumbnail.jpg", plain[:2] + _segment(0xE1, b"Exif\0\0nothing" + plain) + plain[2:], pixels)
    yield Odd("named.png", plain, pixels)
    grey = saved(image.convert("L"), "JPEG")
    yield Odd("grey.jpg", grey, rgb(np.asarray(Image.open(io.BytesIO(grey)))[..., None]))
    ink = noise(5, 5, 4, below=256, seed=4).repeat(8, 0).repeat(8, 1)  # flat blocks: next to nothing is lost
    shares = (255 - ink.astype(float)) / 255
    paper = np.floor(255 * shares[..., :3] * shares[..., 3:] + 0.5).astype(np.uint8)
    yield Odd("cmyk.jpg", saved(Image.fromarray(ink, "CMYK"), "JPEG", quality=100), paper, 3)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield Odd(f"turned-{orientation}.jpg", saved(image, "JPEG", quality=90, exif=exif), turned(pixels, orientation))
    broken = _segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    yield Odd("broken-exif.jpg", plain[:2] + broken + plain[2:], pixels)


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


# ------------------------------------------------------------------------------------------------------------ TIFF by hand
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


def _odd_tiffs() -> Iterator[Odd]:
    pixels = noise(17, 19, 3, seed=8)
    image = Image.fromarray(pixels)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield Odd(f"{compression}.tif", saved(image, "TIFF", compression=compression), pixels)
    pages = saved(image, "TIFF", save_all=True, append_images=[Image.new("RGB", (99, 99))])
    yield Odd("pages.tif", pages, pixels)
    yield Odd("tiles.tif", tiff(pixels, tile=16), pixels)
    yield Odd("planes.tif", tiff(pixels, planes=True), pixels)
    yield Odd("turned.tif", tiff(pixels, tags=[(274, 3, [6])]), np.rot90(pixels, -1))
    ink = noise(17, 19, 4, seed=9)
    shares = (255 - ink.astype(float)) / 255
    paper = np.floor(255 * shares[..., :3] * shares[..., 3:] + 0.5).astype(np.uint8)
    yield Odd("cmyk.tif", tiff(ink, photometric=5), paper)
    deep = noise(17, 19, 3, below=2**16, seed=10)
    for name, options in {
        "": {},
        "-motorola": {"order": ">"},
        "-deflate": {"deflate": True},
        "-tiles": {"tile": 16},
    }.items():
        yield Odd(f"deep{name}.tif", tiff(deep, **options), to_eight(deep, 16))
    yield Odd("deep-turned.tif", tiff(deep, tags=[(274, 3, [6])]), np.rot90(to_eight(deep, 16), -1))
    clear = noise(17, 19, 4, below=2**16, seed=11)
    yield Odd("deep-alpha.tif", tiff(clear, extra=[2]), to_eight(clear, 16))
    yield Odd("deep-fourth.tif", tiff(clear, extra=[0]), to_eight(clear, 16)[..., :3])
    grey = noise(17, 19, 1, below=2**16, seed=12)
    yield Odd("deep-grey.tif", tiff(grey, photometric=1), rgb(to_eight(grey, 16)))
    yield Odd("deep-grey-inverted.tif", tiff(grey, photometric=0), rgb(to_eight(65_535 - grey, 16)))


def _odd_others() -> Iterator[Odd]:
    pixels, clear = noise(11, 14, 3, seed=5), noise(11, 14, 4, seed=6)
    clear[clear[..., 3] == 0, :3] = 0
    yield Odd("lossless.webp", saved(pixels, "WEBP", lossless=True), pixels)
    yield Odd("lossless-alpha.webp", saved(clear, "WEBP", lossless=True, exact=True), clear)
    smooth = photograph(64, 1)
    yield Odd("lossy.webp", saved(smooth, "WEBP", quality=100), smooth, 48)
    frames = [Image.fromarray(noise(11, 14, 3, seed=i)) for i in (5, 50, 51)]
    moving = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    yield Odd("animated.webp", moving, pixels)
    table = noise(256, 3, seed=7)
    index = noise(11, 14, seed=8)
    drawn = Image.fromarray(index, "P")
    drawn.putpalette(table.tobytes())
    yield Odd("still.gif", saved(drawn, "GIF", optimize=False), table[index])
    see_through = with_alpha(table[index], np.where(index == index[0, 0], 0, 255))
    yield Odd("transparent.gif", saved(drawn, "GIF", optimize=False, transparency=int(index[0, 0])), see_through)
    moving = saved(drawn, "GIF", save_all=True, append_images=[Image.new("P", drawn.size, 3)], optimize=False)
    yield Odd("animated.gif", moving, table[index])
    yield Odd("rgb.bmp", saved(pixels, "BMP"), pixels)
    yield Odd("palette.bmp", saved(drawn, "BMP"), table[index])
    upside_down = bytearray(saved(pixels[::-1].copy(), "BMP"))
    upside_down[22:26] = struct.pack("<i", -11)  # a negative height: rows from the top
    yield Odd("from-the-top.bmp", bytes(upside_down), pixels)
    yield Odd(
        "one-bit.bmp",
        saved(Image.fromarray(index > 99), "BMP"),
        rgb(np.where(index > 99, 255, 0).astype(np.uint8)[..., None]),
    )
    yield Odd("one-pixel.png", saved(pixels[:1, :1].copy()), pixels[:1, :1])
    long = noise(1, 3_000, 3)
    yield Odd("long.png", saved(long), long)


def odd() -> list[Odd]:
    return [*_odd_pngs(), *_odd_jpegs(), *_odd_tiffs(), *_odd_others()]


# ------------------------------------------------------------------------------------------------------------ hostile
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
