"""WebP files: what is written, what is read back, and what is refused."""

import io
import json
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.images import BadPicture, decode_all, encode_webp, webp_text
from diffusion.lineage.replay import outcome, surroundings
from diffusion.serving.receipt import format_of, opened, read_receipt, stamp
from tests.test_receipt import PICTURE, receipt

TEXT = {"diffusion": 'Straße "&" \U0001f600\n', "b": ""}
COMMENT = 0x9286


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def with_chunks(*chunks: bytes, file: bytes = encode_webp(PICTURE)) -> bytes:
    """A simple WebP with these after its pixels."""
    return chunk(b"RIFF", file[8:] + b"".join(chunks))


def exif(comment: bytes, order: str = "<") -> bytes:
    """By Pillow."""
    block = Image.Exif()
    block.endian = order
    block.get_ifd(0x8769)[COMMENT] = comment
    return block.tobytes()


def saying(text: object) -> bytes:
    return with_chunks(chunk(b"EXIF", exif(b"ASCII\0\0\0" + json.dumps(text).encode())))


@pytest.mark.parametrize("shape", [(16, 16), (1, 1), (7, 33)])
def test_every_pixel_and_text_comes_back(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = encode_webp(pixels, TEXT)
    assert np.array_equal(decode_all(data), pixels)
    assert webp_text(data) == TEXT
    assert data == encode_webp(pixels.copy(), dict(TEXT))
    assert webp_text(encode_webp(pixels)) == {}


def test_other_programs_find_the_text() -> None:
    with Image.open(io.BytesIO(encode_webp(PICTURE, TEXT))) as image:
        comment = image.getexif().get_ifd(0x8769)[COMMENT]
    assert json.loads(comment.removeprefix(b"ASCII\0\0\0")) == TEXT


@pytest.mark.parametrize("order", "<>")
def test_text_that_another_program_has_written_again_is_read(order: str) -> None:
    comment = b"ASCII\0\0\0" + json.dumps(TEXT).encode()
    block = exif(comment, order)
    assert block[:8].removeprefix(b"Exif\0\0")[:2] == {"<": b"II", ">": b"MM"}[order]
    assert webp_text(with_chunks(chunk(b"EXIF", block))) == TEXT


@pytest.mark.parametrize("comment", [b"", b"a photograph", b"ASCII\0\0\0a photograph", b"UNICODE\0{\0"])
def test_another_programs_comment_is_none_of_ours(comment: bytes) -> None:
    assert webp_text(with_chunks(chunk(b"EXIF", exif(comment)))) == {}


def test_a_receipt_is_read_back_and_a_changed_pixel_is_found() -> None:
    data = stamp(PICTURE, receipt(2), "webp")
    assert (format_of(data), read_receipt(data)) == ("webp", receipt(2))
    changed = PICTURE.copy()
    changed[3, 4, 1] ^= 1
    with pytest.raises(ValueError, match="changed after"):
        read_receipt(stamp(changed, receipt(), "webp"))
    lossy = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(lossy, "WEBP", quality=80, exif=image.getexif())
    assert not opened(lossy.getvalue()).intact


def test_a_replay_knows_the_file_again() -> None:
    import torch

    data = stamp(PICTURE, receipt(), "webp")
    assert outcome(data, opened(data), PICTURE, surroundings(torch.device("cpu"))).same_bytes


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode_webp(PICTURE), "no text 'diffusion'"),
        (encode_webp(PICTURE, {"diffusion": "{}"}), "not a receipt"),
        (encode_webp(PICTURE, {"diffusion": "{}", "diffusion-edit": "{}"}), "several receipts"),
        (encode_webp(PICTURE, {"diffusion": "[" * 60_000}), "not a receipt"),
        (encode_webp(PICTURE, {"diffusion": "x" * 70_000}), "more than 65,536 characters"),
        (encode_webp(PICTURE, {"diffusion": "x" * 2**20}), "too much text"),
        (with_chunks(chunk(b"EXIF", b""), chunk(b"EXIF", b"")), "two blocks"),
        (with_chunks(chunk(b"EXIF", b"%PDF")), "cannot be read"),
        (with_chunks(chunk(b"EXIF", b"II*\0\xff\xff\xff\xff")), "cannot be read"),
        (with_chunks(*[chunk(b"JUNK", b"")] * 1_001), "more than 1,000 chunks"),
        (saying({"diffusion": 7}), "one text for each key"),
        (with_chunks(chunk(b"EXIF", exif(b'ASCII\0\0\0{"a": "1", "a": "2"}'))), "one text for each key"),
        (with_chunks(b"EXIF" + struct.pack("<I", 2**31)), "truncated"),
        (stamp(PICTURE, receipt(), "webp")[:-30], "truncated"),
    ],
)
def test_what_is_no_receipt_is_refused_in_words(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_receipt(data)


def test_a_canvas_of_millions_of_pixels_is_refused_before_it_takes_memory() -> None:
    data = bytearray(stamp(PICTURE, receipt(), "webp"))
    data[24:30] = b"\xff" * 6
    with pytest.raises(BadPicture, match="too many pixels"):
        opened(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**20), st.integers(0, 255), st.integers(0, 2**20))
def test_a_damaged_file_raises_nothing_else(place: int, value: int, length: int) -> None:
    data = bytearray(stamp(PICTURE, receipt(), "webp"))
    data[place % len(data)] = value
    for damaged in (bytes(data), bytes(data[: length % len(data)])):
        with suppress(ValueError):
            opened(damaged)
