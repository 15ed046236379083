"""The chunks of a PNG: whole and undamaged, or named damage; what makes the pixels; text into a file and out of it.

A PNG is eight bytes and then chunks, each with its length and a checksum.  Only four kinds make the pixels; whatever
else a file holds (profiles, text, an animation's further frames: perhaps megabytes, perhaps harmful) is dropped before
a decoder sees it.  [PNG, sections 5 and 11]
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from diffusion.data.pictures.bad_picture import BadPicture

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


class Png(NamedTuple):
    """What the chunks of a file say, and the bytes of those that make the pixels, as a PNG of their own."""

    width: int
    height: int
    depth: int  # bits of a sample: 1, 2, 4, 8, 16
    alpha: bool  # by its colour type, or by a table or a colour that counts as transparent
    clear_grey: int | None  # 0 .. 2^depth - 1: of grey pictures the level that counts as transparent
    exif: bytes
    data: bytes | memoryview


@cache
def plain_start(height: int, width: int) -> bytes:
    """How an 8-bit RGB PNG of that size begins, its lines in order: signature and header.  [PNG, 11.2.1]"""
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + struct.pack(">I", 13) + header + struct.pack(">I", crc32(header))


def parse(data: bytes | memoryview) -> Png:
    """Check every chunk.  Raises BadPicture: truncated, damaged."""
    view = memoryview(data)
    kept, dropped, exif, transparent, header = [view[:8]], False, b"", b"", None
    for kind, start, end in _chunks(view):
        if header is None:
            if kind != b"IHDR" or end - start != 25:
                raise BadPicture("damaged", f"PNG: the first chunk is {kind!r} and not a header")
            header = struct.unpack_from(">IIBB", view, start + 8)
        if kind in _PIXELS:
            kept.append(view[start:end])
            transparent = view[start + 8 : end - 4] if kind == b"tRNS" else transparent
        else:
            dropped = True
            exif = bytes(view[start + 8 : end - 4]) if kind == b"eXIf" else exif
    width, height, depth, colour = header
    clear_grey = int.from_bytes(transparent[:2], "big") if colour == 0 and transparent else None
    alpha = colour in (4, 6) or (len(transparent) > 0 and colour != 0)
    return Png(width, height, depth, alpha, clear_grey, exif, b"".join(kept) if dropped else data)


def _chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end) of each chunk up to IEND; what follows IEND is no part of the picture."""
    kind, end = b"", 8
    while kind != b"IEND":
        start = end
        if start + 12 > len(view):
            raise BadPicture("truncated", f"PNG: ends after {len(view)} bytes, without its end chunk")
        size, kind = struct.unpack_from(">I4s", view, start)
        end = start + 12 + size
        if end > len(view):
            raise BadPicture(
                "truncated", f"PNG: chunk {kind!r} has {size:,} bytes, the file only {len(view) - start - 12:,}"
            )
        if crc32(view[start + 4 : end - 4]) != struct.unpack_from(">I", view, end - 4)[0]:
            raise BadPicture("damaged", f"PNG: chunk {kind!r} differs from its checksum")
        yield kind, start, end


def with_text(data: bytes, text: Mapping[str, str]) -> bytes:
    """The PNG with `text` in UTF-8 chunks (iTXt) after its header, in its order.  Raises ValueError for a bad key."""
    chunks = []
    for key, value in text.items():
        if not 1 <= len(key) <= 79 or not all("\0" < letter <= "\xff" for letter in key):
            raise ValueError(f"{key!r}: a key of PNG text has 1 to 79 characters of Latin-1")
        body = b"iTXt" + key.encode("latin-1") + b"\0\0\0\0\0" + value.encode()
        chunks.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", crc32(body)))
    return data[:33] + b"".join(chunks) + data[33:]


def png_text(data: bytes, *, longest: int = 2**20) -> dict[str, str]:
    """The text chunks of a PNG (tEXt, zTXt, iTXt), by key; the pixels are not looked at.  [PNG, 11.3.3]

    longest: bytes of all text together, as it is written in the file and unpacked, so that no file can fill the memory.
    Raises BadPicture where the bytes are no whole PNG, there is more text, or one key has two.
    """
    if not data.startswith(SIGNATURE):
        raise BadPicture("not a picture", f"begins with {data[:8].hex(' ')}: no PNG" if data else "it is empty")
    view, found = memoryview(data), {}
    for kind, start, end in _chunks(view):
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        longest -= end - start
        if longest < 0:
            raise BadPicture("too much text", "PNG: its text is longer than a picture's facts are")
        key, text = _text_of(kind, bytes(view[start + 8 : end - 4]), longest)
        longest -= len(text)
        if key in found:
            raise BadPicture("damaged", f"PNG: two texts have the key {key!r}, so what it says cannot be known")
        found[key] = text
    return found


def _text_of(kind: bytes, body: bytes, longest: int) -> tuple[str, str]:
    key, mark, rest = body.partition(b"\0")
    packed = kind == b"zTXt"
    try:
        if not mark:
            raise ValueError("its key has no end")
        if kind == b"iTXt":
            packed, rest = bool(rest[0]), rest[2:].split(b"\0", 2)[2]
        elif packed:
            rest = rest[1:]
        if packed:
            unpacking = zlib.decompressobj()
            rest = unpacking.decompress(rest, longest + 1)
            if len(rest) > longest or not unpacking.eof:
                raise ValueError("it is cut off, or too long unpacked")
        return key.decode("latin-1"), rest.decode("utf-8" if kind == b"iTXt" else "latin-1")
    except (ValueError, LookupError, zlib.error) as error:
        raise BadPicture("damaged", f"PNG: chunk {kind!r} is no text: {error}") from error
