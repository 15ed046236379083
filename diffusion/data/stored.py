"""What a shard holds of one picture, its bytes and its captions, read by its row of the shard's index and checked."""

import json

from zlib_ng.zlib_ng import crc32

from diffusion.data.open_shards import Read
from diffusion.data.pictures.decode import BadPicture
from diffusion.data.pictures.sums import sum_of, sums_of
from diffusion.data.shards import INDEX

Captions = tuple[tuple[str, float], ...]  # a picture's texts, each with its weight
DAMAGE = (BadPicture, OSError)
SPANS = [
    name for name in INDEX.names if name not in ("key", "label")
]  # of a row: what `stored_at` and `captions_at` take


def undamaged(stored: list[bytes | memoryview], sums: list[int]) -> list[bytes | memoryview]:
    """The bytes of pictures, none for those that differ from their crc32, which `stored_at` says more about."""
    actual = sums_of(stored, crc32)
    if actual == sums:
        return stored
    return [data if own == told else b"" for data, own, told in zip(stored, actual, sums, strict=True)]


def stored_at(read: Read, row: tuple, captions: bool) -> tuple[bytes | memoryview, Captions]:
    """The bytes of a picture, by the spans its row of the index names, and its captions, where they are wanted.  Raises one
    of DAMAGE."""
    number, start, size, crc, *_ = row
    if not (captions and number):
        picture, text = read(size, start), b""
    else:  # one stretch of the tar that has both: they are neighbours
        words_start, words_size = _place_of_captions(row)
        begin = min(start, words_start)
        data = memoryview(read(max(start + size, words_start + words_size) - begin, begin))
        picture = data[start - begin : start - begin + size]
        text = data[words_start - begin : words_start - begin + words_size]
    if sum_of(picture, crc32) != crc:
        if len(picture) != size:
            raise BadPicture("truncated", f"{len(picture)} of {size} bytes at offset {start}")
        raise BadPicture("damaged", "its crc32 is not that of the index")
    return picture, _parsed(text, number) if text else ()


def captions_at(read: Read, row: tuple) -> Captions:
    """The captions of a picture alone.  Raises one of DAMAGE."""
    number = row[0]
    if not number:
        return ()
    start, size = _place_of_captions(row)
    text = read(size, start)
    return _parsed(text, number) if text else ()


def _place_of_captions(row: tuple) -> tuple[int, int]:
    """(offset, size) in the tar: a single caption stands alone, several are among the facts."""
    number, _, _, _, json_start, json_size, txt_start, txt_size = row
    return (txt_start, txt_size) if number == 1 else (json_start, json_size)


def _parsed(text: bytes | memoryview, number: int) -> Captions:
    """So many captions of a picture as they are stored.  Raises BadPicture."""
    try:
        words = str(text, "utf-8")
        if number == 1:
            return ((words, 1.0),)
        return tuple((text, weight) for text, weight in json.loads(words)["captions"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadPicture("damaged", f"its captions cannot be read: {type(error).__name__}") from error


def first_of(captions: Captions) -> str:
    """The first text; "" where there is none."""
    return captions[0][0] if captions else ""
