"""Aspect buckets: the sizes, by brute force; whose is whose; what the recipe refuses."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from diffusion.data.pictures.buckets import buckets_by, buckets_of, size_for
from diffusion.data.pictures.fit import cropped, fit
from diffusion.recipe import Recipe, ShardRecipe, TrainRecipe, digest_of

steps = st.sampled_from([1, 2, 4, 8, 16])
shapes = st.tuples(steps, st.integers(1, 12), st.floats(1.01, 8))  # step, steps of the square's side, aspect


@given(shapes)
@settings(deadline=None)
def test_buckets_are_all_the_largest_sizes_within_the_area_and_the_aspect(shape):
    step, n, aspect = shape
    limit = (n * step) ** 2
    sides = range(step, limit + 1, step)

    def room(height: int, width: int) -> bool:
        return height * width <= limit

    slow = [
        (h, w)
        for h in sides
        for w in range(step, limit // h + 1, step)
        if not room(h + step, w) and not room(h, w + step) and max(h, w) / min(h, w) <= aspect
    ]
    found = buckets_of(n * step, step, aspect)
    assert sorted(found) == sorted(slow)
    assert (n * step, n * step) in found
    assert {(w, h) for h, w in found} == set(found)
    aspects = [Fraction(w, h) for h, w in found]
    assert aspects == sorted(set(aspects))


def test_at_1024_pixels_they_are_those_that_are_usual():
    wide = {
        (768, 1344),
        (832, 1216),
        (896, 1152),
        (960, 1088),
        (1024, 1024),
    }  # [SDXL, App. I] has these, and smaller ones
    assert set(buckets_of(1024, 64, 1.75)) == wide | {(w, h) for h, w in wide}


@given(shapes, st.integers(1, 3_000), st.integers(1, 3_000))
@settings(deadline=None)
def test_a_picture_gets_the_bucket_nearest_in_log_aspect(shape, width, height):
    step, n, aspect = shape
    if not 8 <= n * step <= 1024 or n * step % 8:
        n, step = 8, 8
    recipe = ShardRecipe(resolution=n * step, bucket_step=step, bucket_aspect=aspect)
    (h, w), buckets = size_for(width, height, recipe), buckets_by(recipe)

    def away(size: tuple[int, int]) -> float:
        return abs(math.log(width / height) - math.log(size[1] / size[0]))

    nearest = min(map(away, buckets))
    assert away((h, w)) == pytest.approx(nearest, abs=1e-12)
    assert size_for(height, width, recipe) == (w, h)  # lying or standing


def test_the_middle_belongs_to_the_bucket_nearer_to_the_square():
    recipe = ShardRecipe(resolution=64, bucket_aspect=4)
    assert buckets_by(recipe)[-2:] == ((40, 96), (32, 128))
    recipe = ShardRecipe(resolution=32, bucket_aspect=4, bucket_step=16)  # of 2 x 2 steps: 1 x 4, 2 x 2, 4 x 1
    assert buckets_by(recipe) == ((64, 16), (32, 32), (16, 64))
    assert [size_for(w, h, recipe) for w, h in ((2, 1), (1, 2), (201, 100), (100, 201))] == [
        (32, 32),
        (32, 32),
        (16, 64),
        (64, 16),
    ]


def test_without_an_aspect_all_are_squares_and_the_recipe_is_as_it_was():
    recipe = ShardRecipe(resolution=32)
    assert (buckets_by(recipe), size_for(900, 3, recipe)) == ((), (32, 32))
    assert "bucket" not in recipe.model_dump_json()
    assert digest_of(recipe) != digest_of(ShardRecipe(resolution=32, bucket_aspect=2))


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    high=st.integers(1, 20),
    wide=st.integers(1, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_picture_is_cut_to_the_shape_and_resized_as_by_pillow_to_a_level(height, width, high, wide, seed):
    """Of greys that do not overshoot the range, where Pillow clips between the two passes."""
    size = 8 * high, 8 * wide
    pixels = np.random.default_rng(seed).integers(96, 160, (height, width, 3), dtype=np.uint8)
    h, w = cropped(height, width, size)
    assert (h, w) == (height, w) or (h, w) == (h, width)  # it touches two borders
    exact = min(Fraction(height, size[0]), Fraction(width, size[1]))
    assert abs(h - exact * size[0]) <= Fraction(1, 2) or h == 1
    assert abs(w - exact * size[1]) <= Fraction(1, 2) or w == 1
    top, left = (height - h) // 2, (width - w) // 2
    window = Image.fromarray(pixels).crop((left, top, left + w, top + h))
    expected = np.asarray(window.resize(size[::-1], Image.Resampling.LANCZOS)).astype(int)
    assert abs(fit(pixels, size=size, background="#ffffff") - expected).max() <= 1


@pytest.mark.parametrize(
    ("shard", "train", "says"),
    [
        ({"bucket_aspect": 2, "bucket_step": 24}, {}, "bucket_step=24 must divide resolution=64"),
        ({"bucket_aspect": 1}, {}, "greater than 1"),
        ({"bucket_aspect": 2, "bucket_step": 4}, {}, "bucket_step=4 must be a multiple of .* = 8"),
        ({"bucket_aspect": 2}, {"degradations": ("inpainting",)}, "without buckets"),
        (
            {"bucket_aspect": 2, "bucket_step": 64},
            {"codec": "autoencoder-kl", "codec_channels": 4, "codec_factor": 8, "unet": {"attention": ()}},
            "leave one of the two out",
        ),
    ],
)
def test_what_cannot_be_is_refused(shard, train, says):
    with pytest.raises(ValidationError, match=says):
        Recipe(shard=ShardRecipe(**shard), train=TrainRecipe(**train))
