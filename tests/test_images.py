"""Pictures: exact conversions, exact pixels, and damage named instead of passed on."""

import io
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.images import (
    BadPicture,
    content_digest,
    decode,
    decode_png,
    encode_png,
    grid,
    load,
    png_text,
    to_model,
    to_uint8,
)
from tests.files_by_hand import chunk, png_header, saved

WHITE = "#ffffff"


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_every_byte_survives_the_way_to_the_model_and_back():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    x = to_model(images)
    assert x.shape == (1, 3, 16, 16)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), images)


def test_both_layouts_are_the_same_pictures():
    images = torch.from_numpy(noise(10, 20)).unsqueeze(0)
    assert torch.equal(to_model(images), to_model(images.permute(0, 3, 1, 2)))


def test_to_uint8_rounds_to_the_nearest_clips_and_refuses_what_is_no_picture():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).expand(1, 3, 1, 5)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), torch.nan))
    with pytest.raises(ValueError, match="uint8"):
        to_model(torch.zeros(1, 3, 2, 2))


def test_transparency_is_composited_on_the_background():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    pixels[1, 0] = (0, 0, 0, 51)  # a fifth black
    out = decode(saved(Image.fromarray(pixels)), resolution=2, background="#ff8000")
    assert out[0, 0].tolist() == [10, 20, 30]
    assert out[0, 1].tolist() == [255, 128, 0]
    assert out[1, 0].tolist() == [204, 102, 0]


def test_palette_and_grey_transparency_count_too():
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    data = saved(palette.resize((2, 2), Image.Resampling.NEAREST), transparency=1)
    assert decode(data, resolution=2, background="#0a0b0c")[0].tolist() == [[1, 2, 3], [10, 11, 12]]
    grey = saved(Image.merge("LA", [Image.new("L", (1, 1), 7), Image.new("L", (1, 1), 0)]))
    assert decode(grey, resolution=1, background="#0a0b0c")[0, 0].tolist() == [10, 11, 12]


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 257, 32_768, 65_535]] * 4, np.uint16)
    out = decode(saved(Image.fromarray(values)), resolution=4, background=WHITE)
    assert out[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_largest_centred_square_is_kept_exactly_where_it_fits():
    pixels = noise(6, 11)
    assert np.array_equal(decode(saved(Image.fromarray(pixels)), resolution=6, background=WHITE), pixels[:, 2:8])
    assert np.array_equal(
        decode(saved(Image.fromarray(pixels.transpose(1, 0, 2))), resolution=6, background=WHITE),
        pixels.transpose(1, 0, 2)[2:8],
    )


def test_resizing_is_antialiased():
    checker = np.indices((64, 64)).sum(0) % 2 * 255  # without a filter a picture of 0s or 255s
    out = decode(saved(Image.fromarray(checker.astype(np.uint8))), resolution=16, background=WHITE)
    assert np.abs(out.astype(int) - 127).max() <= 8


def test_exif_orientation_is_applied():
    pixels = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = decode(saved(Image.fromarray(pixels), exif=exif), resolution=8, background=WHITE)
    assert np.array_equal(out, np.rot90(pixels, -1))


def test_png_round_trip_is_exact_deterministic_and_carries_text():
    pixels = noise(9, 7)
    text = {"receipt": '{"seed": 3}', "caption": "Füße 🦊"}
    data = encode_png(pixels, text)
    assert np.array_equal(decode_png(data), pixels)
    assert png_text(data) == text
    assert encode_png(pixels.copy(), dict(text)) == data
    assert encode_png(np.asfortranarray(pixels), text) == data
    assert np.array_equal(np.array(Image.open(io.BytesIO(data))), pixels)
    with pytest.raises(ValueError, match="uint8"):
        encode_png(pixels.astype(np.float32))
    with pytest.raises(BadPicture):
        png_text(b"no picture")


def test_equal_pixels_have_equal_content_whatever_the_file():
    image = Image.fromarray(noise(5, 6))
    png, bmp = load(saved(image)), load(saved(image, "BMP"))
    assert content_digest(png) == content_digest(bmp) == content_digest(load(saved(image, "WEBP", lossless=True)))
    assert content_digest(png) != content_digest(png.transpose(Image.Transpose.ROTATE_180))
    flat = Image.new("RGB", (2, 3))
    assert content_digest(flat) != content_digest(flat.resize((3, 2)))


def png_claiming(width: int, height: int) -> bytes:
    return png_header(width, height) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


GOOD = saved(Image.fromarray(noise(32, 32)))
JPEG = saved(Image.fromarray(noise(32, 32)), "JPEG")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"just text, named .png", "not a picture"),
        (GOOD[: len(GOOD) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (GOOD[:60] + b"\xff" * 40 + GOOD[100:], "damaged"),
        (png_claiming(9_000, 9_000), "too many pixels"),
        (png_claiming(60_000, 60_000), "too many pixels"),
        (saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "unsupported pixels"),
    ],
)
def test_what_cannot_be_used_is_named(data, kind):
    with pytest.raises(BadPicture) as error:
        load(data)
    assert error.value.kind == kind
    assert error.value.detail
    assert " at 0x" not in str(error.value)  # an address would differ from run to run


@given(st.sampled_from([GOOD, JPEG, saved(Image.fromarray(noise(32, 32)), "GIF")]), st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_decode_or_are_bad_pictures(data, draw):
    damaged = bytearray(data[: draw.draw(st.integers(1, len(data)))])
    for _ in range(draw.draw(st.integers(0, 4))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = decode(bytes(damaged), resolution=8, background=WHITE)
    except BadPicture:
        return
    assert image.shape == (8, 8, 3)


def test_grid_places_pictures_row_by_row():
    pictures = [np.full((4, 6, 3), i, np.uint8) for i in range(5)]
    out = grid(pictures, 3, gap=1)
    assert out.shape == (1 + 2 * 5, 1 + 3 * 7, 3)
    assert np.array_equal(out[6:10, 8:14], pictures[4])
    assert (out[6:10, 15:21] == 255).all()  # no sixth picture
    labelled = grid(pictures, 3, ("first", "second"), gap=1)
    assert np.array_equal(labelled[:, -out.shape[1] :], out)
    assert (labelled[:5, : -out.shape[1]] < 128).any()  # something is written beside the first row
    with pytest.raises(ValueError, match="labels"):
        grid(pictures, 3, ("one",))
    with pytest.raises(ValueError, match="at least one"):
        grid([], 3)
