"""From all pixels to a dataset's square: Pillow's bits, limits that are policy, identity by content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.pictures.bad_picture import POLICY, BadPicture
from diffusion.data.pictures.fit import _rounded, check_wanted, content_digest, fit, opaque

WHITE = "#ffffff"


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    resolution=st.integers(1, 16).map(lambda n: 8 * n),
    seed=st.integers(0, 2**32 - 1),
    hard=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_resizing_is_pillows_to_the_last_bit(height, width, resolution, seed, hard):
    """Black and white pixels overshoot the range, where clipping between the two passes shows."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if hard else pixels
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((resolution, resolution), Image.Resampling.LANCZOS))
    assert np.array_equal(fit(pixels, size=(resolution, resolution), background=WHITE), expected)


@pytest.mark.parametrize("resolution", [8, 24, 64])
def test_large_pictures_are_resized_in_bands_of_rows(resolution):
    pixels = np.random.default_rng(1).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.LANCZOS))
    assert np.array_equal(fit(pixels, size=(resolution, resolution), background=WHITE), expected)


def test_sums_are_rounded_halves_up_and_clipped():
    tick = 2.0**-22
    sums = np.array([[0.5, 1.5, 2.5, 0.5 - tick, 254.5, -3, -tick, 255.5, 300]])
    assert _rounded(sums).tolist() == [[1, 2, 3, 0, 255, 0, 0, 255, 255]]


def test_a_plain_picture_stays_plain():
    for side in (5, 64, 99):
        assert (fit(np.full((side, side, 3), 201, np.uint8), size=(64, 64), background=WHITE) == 201).all()


def test_the_result_is_ones_own():
    pixels = np.zeros((8, 12, 3), np.uint8)
    for picture in (pixels, Image.fromarray(pixels)):
        fit(picture, size=(8, 8), background=WHITE)[:] = 9
    assert not pixels.any()


def test_transparency_gives_way_to_the_background():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    assert opaque(pixels, "#ff8000").tolist() == [[[10, 20, 30], [255, 128, 0], [204, 102, 0]]]
    assert opaque(pixels[..., :3], "#ff8000") is not None
    assert np.array_equal(opaque(pixels[..., :3], "#ff8000"), pixels[..., :3])


def test_content_is_that_of_the_pixels_whatever_holds_them():
    pixels = np.random.default_rng(2).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    clear = np.dstack([pixels, np.full((5, 6), 255, np.uint8)])
    assert content_digest(pixels) == content_digest(Image.fromarray(pixels)) == content_digest(clear)
    assert content_digest(pixels) != content_digest(pixels[:, ::-1])
    assert content_digest(pixels) != content_digest(pixels.reshape(6, 5, 3))


@pytest.mark.parametrize(
    ("size", "kind"),
    [((64, 64), None), ((64, 192), None), ((192, 64), None), ((63, 64), "too small"), ((64, 193), "too elongated")],
)
def test_limits_are_the_recipes(size, kind):
    for width, height in (size, size[::-1]):
        if kind is None:
            check_wanted(width, height, min_side=64, max_aspect=3)
            continue
        with pytest.raises(BadPicture) as error:
            check_wanted(width, height, min_side=64, max_aspect=3)
        assert error.value.kind == kind
        assert kind in POLICY
    check_wanted(1, 10_000, min_side=1, max_aspect=None)
