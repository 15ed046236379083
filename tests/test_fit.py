"""From all pixels to a dataset's square: the filter's values, limits that are policy, identity by content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.pictures import fit as module
from diffusion.data.pictures.bad_picture import POLICY, BadPicture
from diffusion.data.pictures.fit import _rounded, check_wanted, content_digest, fit, opaque

WHITE = "#ffffff"


def lanczos(side: int, outputs: int) -> np.ndarray:
    """(outputs, side) of float64, from the definition: the window of three lobes, as wide as an output pixel at least."""
    stretch = max(side / outputs, 1)
    x = ((np.arange(side) + 0.5) - (np.arange(outputs)[:, None] + 0.5) * side / outputs) / stretch
    weights = np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


SIDES = {"height": st.integers(1, 300), "width": st.integers(1, 300), "seed": st.integers(0, 2**32 - 1)}
RESOLUTION = st.integers(1, 16).map(lambda n: 8 * n)


@given(**SIDES, resolution=RESOLUTION, hard=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_resized_pixel_is_the_filters_value_rounded(height, width, resolution, seed, hard):
    """Black and white pixels overshoot the range."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if hard else pixels
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square, filter = pixels[top : top + side, left : left + side], lanczos(side, resolution)
    expected = np.clip(np.einsum("yi,xj,ijc->yxc", filter, filter, square.astype(float), optimize=True), 0, 255)
    fitted = fit(pixels, size=(resolution, resolution), background=WHITE)
    assert abs(fitted - expected).max() < (0.5 if side != resolution else 0) + 0.01


@given(**SIDES, resolution=RESOLUTION)
@settings(max_examples=30, deadline=None)
def test_resizing_is_pillows_to_a_level(height, width, resolution, seed):
    """Of greys that do not overshoot the range, where Pillow clips between the two passes."""
    pixels = np.random.default_rng(seed).integers(96, 160, (height, width, 3), dtype=np.uint8)
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.fromarray(pixels).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((resolution, resolution), Image.Resampling.LANCZOS)).astype(int)
    assert abs(fit(pixels, size=(resolution, resolution), background=WHITE) - expected).max() <= 1


@pytest.mark.parametrize(("high", "wide"), [(24, 24), (64, 48), (8, 32)])
@pytest.mark.parametrize("band", [1, 2**13, 2**30])
def test_resizing_is_exact_whatever_is_done_at_a_time(monkeypatch, high, wide, band):
    """The products in whole numbers: no order of sums, and no machine, gives another bit."""
    monkeypatch.setattr(module, "_BAND", band)
    pixels = np.random.default_rng(1).integers(0, 256, (160, 160 * wide // high, 3), dtype=np.uint8)
    filters = []
    for side, outputs in zip(pixels.shape, (high, wide), strict=False):
        whole = np.zeros((outputs, side), np.int64)
        for at, (low, weights) in module._filter(side, outputs).items():
            whole[at : at + len(weights), low : low + weights.shape[1]] = weights * 2**20
        assert abs(whole / 2**20 - lanczos(side, outputs)).max() < 2.0**-20
        filters.append(whole)
    sums = np.einsum("xj,yjc->yxc", filters[1], np.einsum("yi,ijc->yjc", filters[0], pixels.astype(np.int64)))
    expected = np.clip((sums + 2**39) >> 40, 0, 255)
    assert np.array_equal(fit(pixels, size=(high, wide), background=WHITE), expected)


def test_sums_are_rounded_halves_up_and_clipped():
    tick = 2.0**-40
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
