import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.random import Stream, bits, normal, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with Random123 (kat_vectors, philox4x32 10)
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    def parse(text):
        return [int(word, 16) for word in text.split()]

    k0, k1 = parse(key)
    assert philox(torch.tensor([parse(counter)]), (k0, k1))[0].tolist() == parse(words)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_a_number_depends_on_its_index_alone(indices, seed, n):
    together = bits(seed, Stream.NOISE, torch.tensor(indices), n)
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(row, bits(seed, Stream.NOISE, torch.tensor([index]), n)[0])


def test_streams_seeds_and_indices_share_nothing():
    index = torch.arange(50)
    rows = [bits(seed, stream, index, 4) for seed in (0, 1) for stream in Stream]
    words = torch.cat(rows).flatten()
    assert len(words.unique()) > len(words) - 3  # 2 of 3,200 equal words out of 2^32 would already be a miracle


def test_normal_has_the_moments_of_a_gaussian():
    z = normal(5, Stream.NOISE, torch.arange(64), (3, 64, 64)).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    pairs = z.flatten()[: n // 2 * 2].view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 / math.sqrt(n / 2)


def test_uniform_stays_inside_the_open_interval():
    u = uniform(0, Stream.SIGMA, torch.arange(200_000))
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.double().mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(u))


def test_an_impossible_seed_is_refused():
    with pytest.raises(ValueError, match="from 0 to 4294967295"):
        bits(2**32, Stream.NOISE, torch.arange(2), 1)
