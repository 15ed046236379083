"""Picture files as the world has them, odd but right: each with the pixels it must give.  All made by code."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.files_by_hand import chunk, noise, png, rgb, saved, segment, tiff, to_eight, with_alpha
from tests.photographs import photograph


class Odd(NamedTuple):
    name: str
    data: bytes
    pixels: np.ndarray  # uint8 (H, W, 3 or 4)
    within: int = 0  # levels: of what is lossy


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
    yield Odd("thumbnail.jpg", plain[:2] + segment(0xE1, b"Exif\0\0nothing" + plain) + plain[2:], pixels)
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
    broken = segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    yield Odd("broken-exif.jpg", plain[:2] + broken + plain[2:], pixels)


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
