import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

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


# Statistics of half a million numbers of one seed and stream: fixed, so a failure is a change of the generator.  Each passes
# at one in a thousand, two-sided.
MANY = torch.arange(512)


@pytest.fixture(scope="module")
def words():
    return bits(11, Stream.NOISE, MANY, 1_024)


def p_of_counts(counts, expected):
    """Of a chi-squared test: the share of good generators that lie further from `expected`."""
    return stats.chisquare(
        counts.double().numpy(), expected.double().numpy() if torch.is_tensor(expected) else None
    ).pvalue


def fair(p):
    return 5e-4 < p < 1 - 5e-4


def test_every_bit_is_a_fair_coin(words):
    ones = torch.stack([(words >> bit & 1).sum() for bit in range(32)]).double()
    z = (ones - words.numel() / 2) / math.sqrt(words.numel() / 4)
    assert fair(stats.chi2.sf((z**2).sum().item(), 32))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_are_equally_likely(words, shift):
    assert fair(p_of_counts((words >> shift & 255).flatten().bincount(minlength=256), None))


@pytest.mark.parametrize("apart", [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (2, 0), (64, 0)])
def test_neighbours_tell_nothing_of_each_other(words, apart):
    """The serial test in four dimensions of four bits, along a picture and from picture to picture."""
    rows, columns = apart
    a, b = words[: len(words) - rows, : 1_024 - columns], words[rows:, columns:]
    together = (a >> 28) << 12 | (b >> 28) << 8 | (a & 15) << 4 | b & 15
    assert fair(p_of_counts(together.flatten().bincount(minlength=2**16), None))


@pytest.mark.parametrize("other", [{"seed": 12}, {"stream": Stream.SIGMA}, {"index": MANY + 2**32}])
def test_the_same_place_of_another_seed_stream_or_index_tells_nothing(words, other):
    drawn = bits(**{"seed": 11, "stream": Stream.NOISE, "index": MANY, "n": 1_024} | other)
    together = (words >> 24) << 8 | drawn >> 24
    assert fair(p_of_counts(together.flatten().bincount(minlength=2**16), None))


def test_one_bit_of_the_index_changes_half_of_all_bits():
    index = torch.arange(500)
    for bit in (0, 1, 9, 31, 32, 40):
        flipped = bits(3, Stream.NOISE, index, 8) ^ bits(3, Stream.NOISE, index ^ (1 << bit), 8)
        changed = torch.stack([flipped >> i & 1 for i in range(32)]).double().sum(dim=(0, 2))  # of 256
        assert fair(stats.chi2.sf((((changed - 128) / 8) ** 2).sum().item(), len(index)))


def test_uniform_and_normal_have_their_distributions():
    u = uniform(11, Stream.NOISE, MANY, (1_024,)).double()
    assert fair(stats.kstest(u.flatten().numpy(), "uniform").pvalue)
    z = normal(11, Stream.NOISE, MANY, (1_024,)).double()
    assert fair(stats.kstest(z.flatten().numpy(), "norm").pvalue)
    assert fair(stats.kstest((z[:, ::2] ** 2 + z[:, 1::2] ** 2).flatten().numpy(), "chi2", (2,)).pvalue)
    # the tails, where Box-Muller of coarse uniform numbers would end early: beyond 4 there are 6.3e-5 of all
    assert fair(stats.binomtest(int((z.abs() > 4).sum()), z.numel(), 2 * stats.norm.sf(4)).pvalue)


def test_normal_is_white_along_and_across_pictures():
    z = normal(11, Stream.NOISE, MANY, (1_024,)).double()
    for dim in (0, 1):
        power = (torch.fft.rfft(z, dim=dim).abs() ** 2 / z.shape[dim]).mean(dim=1 - dim)[
            1:-1
        ]  # each a mean of exponentials
        n = z.shape[1 - dim]
        assert fair(stats.chi2.sf((((power - 1) * math.sqrt(n)) ** 2).sum().item(), len(power)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_words_and_the_same_normals_up_to_the_last_digit():
    index = torch.arange(256)
    assert torch.equal(bits(7, Stream.NOISE, index.cuda(), 512).cpu(), bits(7, Stream.NOISE, index, 512))
    here, there = (normal(7, Stream.NOISE, i, (512,)).cpu() for i in (index, index.cuda()))
    assert (here - there).abs().max() < 4 * torch.finfo(torch.float32).eps * 6.7
