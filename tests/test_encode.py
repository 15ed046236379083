"""Pixels -> bytes: exact, the same each time, readable by others, and with text."""

import io
import zipfile
from importlib import resources

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.images import decode
from diffusion.data.pictures.decode import decode_all, decode_into, decode_png
from diffusion.data.pictures.encode import encode_jpeg, encode_png
from diffusion.data.pictures.plain_png import encode_plain
from diffusion.data.pictures.png import png_text
from tests.photographs import photograph


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 8, 256]), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_png_holds_every_pixel_and_any_reader_finds_them(height, width, levels, seed):
    """Few levels make a drawing, many a photograph, and very many a rough one: each way of encoding."""
    pixels = np.random.default_rng(seed).integers(0, levels, (height, width, 3), dtype=np.uint8)
    data = encode_png(pixels)
    assert encode_png(np.asfortranarray(pixels)) == data
    out = np.empty_like(pixels)
    decode_into(data, out)
    for read in (out, decode_png(data), decode_all(data), np.asarray(Image.open(io.BytesIO(data)))):
        assert np.array_equal(read, pixels)


def test_a_png_is_about_as_small_as_pillows():
    drawing = np.kron(np.arange(16).reshape(4, 4) * 15, np.ones((16, 16), int))[..., None].repeat(3, 2).astype(np.uint8)
    framed = photograph(64, 1)
    framed[:2] = 255
    for pixels in (photograph(64, 1), photograph(128, 2), framed, drawing):
        usual = io.BytesIO()
        Image.fromarray(pixels).save(usual, "PNG")
        assert len(encode_png(pixels)) <= 1.05 * len(usual.getvalue()) + 64


def test_drawings_so_small_that_most_is_edges_are_told_from_smooth_photographs():
    archive = str(resources.files("diffusion.data") / "embedded" / "noto-emoji-64.zip")
    with zipfile.ZipFile(archive) as files:
        names = [name for name in files.namelist() if name.endswith(".png")][::100]
        drawings = [decode(files.read(name), resolution=32, background="#ffffff") for name in names]
    sizes = np.zeros(2)
    for pixels in drawings:
        usual = io.BytesIO()
        Image.fromarray(pixels).save(usual, "PNG")
        sizes += len(encode_png(pixels)), len(usual.getvalue())
    assert sizes[0] <= 1.1 * sizes[1]
    noise = np.random.default_rng(0).normal(size=(64, 64, 3))
    sky = (128 + 150 * cv2.GaussianBlur(noise, (0, 0), 6)).round().astype(np.uint8)
    assert np.mean(sky[:, 1:] == sky[:, :-1]) > 0.4  # more than in many of the drawings
    assert len(encode_png(sky)) < 0.9 * len(encode_plain(sky))


@given(st.dictionaries(st.sampled_from(["receipt", "Größe", "x" * 79]), st.text(alphabet="aß日🦊\n{}", max_size=40)))
@settings(max_examples=30, deadline=None)
def test_text_comes_back_and_changes_no_pixel(text):
    pixels = photograph(8, 3)
    data = encode_png(pixels, text)
    assert png_text(data) == text
    assert np.array_equal(decode_png(data), pixels)


def test_a_key_that_no_png_can_hold_is_refused():
    for key in ("", "x" * 80, "a\0b", "日本"):
        with pytest.raises(ValueError, match="1 to 79 characters"):
            encode_png(photograph(8, 3), {key: "text"})


def test_a_jpeg_is_nearer_the_higher_its_quality():
    pixels = photograph(64, 4)
    sizes, errors = [], []
    for quality in (50, 80, 95, 100):
        data = encode_jpeg(pixels, quality)
        assert encode_jpeg(np.asfortranarray(pixels), quality) == data
        sizes.append(len(data))
        errors.append(np.abs(decode_all(data).astype(int) - pixels).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1
    with pytest.raises(ValueError, match="uint8"):
        encode_jpeg(pixels[..., 0], 95)
