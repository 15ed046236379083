"""Near duplicates: what moves a hash and what does not, and an index that is exact."""

import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.pictures.decode import decode_all
from diffusion.data.pictures.encode import encode_jpeg
from diffusion.data.pictures.near import NearIndex, bands, distance, perceptual_hash, probes
from tests.photographs import photograph

HASHES = st.integers(0, 2**64 - 1)


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("bits", "change"),
    [
        (2, lambda x: resized(x, 64)),
        (2, lambda x: resized(x, 300)),
        (3, lambda x: decode_all(encode_jpeg(x, 50))),
        (6, lambda x: x[1:-1, 1:-1]),
        (3, lambda x: (x * 0.8).astype(np.uint8)),
        (3, lambda x: np.minimum(x, 235) + np.uint8(20)),
    ],
    ids=["halved", "enlarged", "jpeg 50", "cropped", "darker", "brighter"],
)
def test_a_picture_saved_again_keeps_its_hash_within_a_few_bits(bits, change):
    for seed in range(5):
        pixels = photograph(128, seed)
        before, after = perceptual_hash(pixels), perceptual_hash(np.ascontiguousarray(change(pixels)))
        assert distance(before, after) <= bits


def test_different_pictures_have_different_hashes():
    hashes = [perceptual_hash(photograph(64, seed)) for seed in range(20)]
    assert min(distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 8


def test_another_colour_is_another_picture():
    shape = np.hypot(*(np.indices((64, 64)) - 32)) < 20 + 10 * np.cos(np.arctan2(*(np.indices((64, 64)) - 32)) * 3)
    red, blue = (
        np.where(shape[..., None], colour, (255, 255, 255)).astype(np.uint8)
        for colour in ((250, 40, 40), (30, 90, 250))
    )
    assert distance(perceptual_hash(red), perceptual_hash(blue)) > 4
    assert distance(perceptual_hash(red), perceptual_hash(decode_all(encode_jpeg(red, 80)))) <= 4


def test_what_is_too_plain_has_no_hash():
    for colour in (0, 255, 127):
        blank = np.full((50, 40, 3), colour, np.uint8)
        assert perceptual_hash(blank) is None
        assert perceptual_hash(decode_all(encode_jpeg(blank, 60))) is None
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (64, 64, 3))
    assert perceptual_hash(np.ascontiguousarray(ramp)) is None


@given(HASHES, st.integers(0, 16), st.data())
@settings(deadline=None)
def test_whatever_is_within_t_bits_is_asked_for(hash, t, draw):
    flipped = draw.draw(st.sets(st.integers(0, 63), max_size=t))
    other = hash ^ sum(1 << bit for bit in flipped)
    assert distance(hash, other) == len(flipped)
    assert set(probes(hash, t)) & set(bands(other))


def first_of_each(hashes: list[int | None], t: int) -> list[int | None]:
    """The slow version: the first kept one before it within t bits, or None where the picture is kept itself."""
    kept: list[int] = []
    answers = []
    for i, hash in enumerate(hashes):
        near = [k for k in kept if hash is not None and distance(hashes[k], hash) <= t]
        answers.append(near[0] if near else None)
        if hash is not None and not near:
            kept.append(i)
    return answers


@given(st.integers(0, 16), st.lists(HASHES, min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_the_index_answers_as_a_comparison_with_all(t, centres, draw):
    hashes = []
    for _ in range(draw.draw(st.integers(1, 20))):
        flips = draw.draw(st.sets(st.integers(0, 63), max_size=t + 2))
        around = draw.draw(st.sampled_from(centres)) ^ sum(1 << bit for bit in flips)
        hashes.append(draw.draw(st.sampled_from([around, around, around, None])))
    index = NearIndex(sqlite3.connect(":memory:"))
    answers = [index.keep(f"{i:03d}", hash, t) for i, hash in enumerate(hashes)]
    assert [None if name is None else int(name) for name in answers] == first_of_each(hashes, t)


def test_the_index_goes_on_where_it_was_interrupted(tmp_path):
    hash = perceptual_hash(photograph(64, 1))
    with sqlite3.connect(tmp_path / "near.sqlite") as connection:
        NearIndex(connection).add("a.png", hash)
    with sqlite3.connect(tmp_path / "near.sqlite") as connection:
        index = NearIndex(connection)
        assert index.keep("b.png", hash ^ 0b111, 3) == "a.png"
        assert index.keep("c.png", hash ^ 0b1111, 3) is None
