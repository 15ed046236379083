"""Bytes -> pixels: one meaning of a picture, and damage named."""

import io
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.images import encode_png
from diffusion.data.pictures.decode import BadPicture, decode_all, decode_into, decode_rows


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth enough for a JPEG, different at every pixel."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (-(-height // 8), -(-width // 8), channels))
    fine = np.kron(coarse, np.ones((8, 8, 1), int))[:height, :width] + draw.integers(-20, 21, (height, width, channels))
    return fine.clip(0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), **options)


def test_a_shards_picture_goes_into_its_row_and_nowhere_else():
    pixels = noise(24, 24)
    for data in (encode_png(pixels), jpeg(pixels, colorsubsampling="444"), jpeg(pixels, colorsubsampling="420")):
        batch = np.full((3, 24, 24, 3), 7, np.uint8)
        decode_into(memoryview(data), batch[1])
        assert np.array_equal(batch[1], np.array(Image.open(io.BytesIO(data))))
        assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize("encode", [encode_png, jpeg])
def test_a_picture_of_another_shape_is_refused(encode):
    for height, width in ((16, 32), (32, 16), (64, 16), (40, 40), (16, 16)):
        with pytest.raises(BadPicture) as error:
            decode_into(encode(noise(height, width)), np.empty((32, 32, 3), np.uint8))
        assert error.value.kind in ("wrong shape", "damaged")
    with pytest.raises(ValueError, match="contiguous"):
        decode_into(encode(noise(32, 32)), np.empty((3, 32, 32), np.uint8).transpose(1, 2, 0))


@given(st.sampled_from([encode_png(noise(24, 24)), jpeg(noise(24, 24))]), st.data())
@settings(max_examples=150, deadline=None)
def test_a_shards_damaged_picture_is_read_as_it_was_or_refused(data, draw):
    """Cut anywhere: always refused.  A changed byte of a PNG cannot change a pixel: each chunk has its checksum."""
    out = np.empty((24, 24, 3), np.uint8)
    with pytest.raises(BadPicture):
        decode_into(data[: draw.draw(st.integers(0, len(data) - 1))], out)
    changed = bytearray(data)
    changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    try:
        decode_into(bytes(changed), out)
    except BadPicture:
        return
    assert data.startswith(b"\xff\xd8") or np.array_equal(out, noise(24, 24))


@given(
    kinds=st.lists(st.sampled_from(["png", "jpeg", "cut", "large", "text", "nothing"]), min_size=1, max_size=8),
    draw=st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_many_pictures_go_into_their_rows_and_the_bad_ones_are_told(kinds, draw):
    """As each alone does."""
    sources = {
        "png": encode_png(noise(16, 24)),
        "jpeg": jpeg(noise(16, 24, seed=1)),
        "cut": encode_png(noise(16, 24))[:-30],
        "large": encode_png(noise(24, 16)),
        "text": b"no picture at all",
        "nothing": b"",
    }
    places = draw.sample(range(10), len(kinds))
    batch = np.full((10, 16, 24, 3), 7, np.uint8)
    bad = decode_rows([memoryview(sources[kind]) for kind in kinds], batch, places)
    alone = np.empty((16, 24, 3), np.uint8)
    for kind, place in zip(kinds, places, strict=True):
        if kind in ("png", "jpeg"):
            decode_into(sources[kind], alone)
            assert np.array_equal(batch[place], alone)
        else:
            with pytest.raises(BadPicture) as error:
                decode_into(sources[kind], alone)
            assert str(bad.pop(place)) == str(error.value)
    assert not bad
    assert all((batch[place] == 7).all() for place in range(10) if place not in places)


def test_opencv_comes_without_a_mark_on_the_process():
    program = """
import os, threading
before = dict(os.environ)
from diffusion.data.pictures.decode import opencv
assert opencv().getNumThreads() == 1
assert (dict(os.environ), threading.active_count()) == (before, 1)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@given(
    st.tuples(st.integers(1, 48), st.integers(1, 48)),
    st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_png_that_pillow_wrote_has_the_pixels_that_pillow_reads(size, mode, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    out = io.BytesIO()
    image.save(out, "PNG")
    read = Image.open(out)
    expected = np.asarray(read.convert("RGBA" if read.has_transparency_data else "RGB"))
    assert np.array_equal(decode_all(out.getvalue()), expected)


@given(
    st.tuples(st.integers(1, 48), st.integers(1, 48)),
    st.integers(1, 100),
    st.sampled_from([0, 1, 2, "4:1:1"]),
    st.booleans(),
    st.sampled_from(["RGB", "L", "CMYK"]),
)
@settings(max_examples=80, deadline=None)
def test_a_jpeg_has_the_pixels_that_pillow_reads(size, quality, subsampling, progressive, mode):
    out = io.BytesIO()
    image = Image.fromarray(noise(*size, channels=4 if mode == "CMYK" else 3), "CMYK" if mode == "CMYK" else "RGB")
    image.convert(mode).save(out, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(out.getvalue())).convert("RGB"))
    assert np.array_equal(decode_all(out.getvalue()), expected)
