"""The order of buckets: batches of one bucket each, exact shares, epochs of their own, position alone decides."""

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffusion.data.bucket_order import Buckets
from diffusion.data.order import Order

WORLDS = (1, 2, 3, 4, 6, 8)


def made(counts: tuple[int, ...], shares: tuple[int, ...] | None = None, batch: int = 24, seed: int = 0) -> Buckets:
    parts = tuple(Order(count, 5, seed, window=7, streams=3) for count in counts)
    return Buckets(parts, shares or counts, batch, seed)


buckets = st.builds(
    lambda pairs, batch, seed: made(*zip(*pairs, strict=True), batch, seed),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40) | st.integers(2**60, 2**70)), min_size=1, max_size=9),
    st.integers(1, 30),
    st.integers(0, 2**32),
)


def by_hand(order: Buckets, batches: int) -> list[tuple[int, int]]:
    """(part, its own count) of each batch, every part remembering how far it has come."""
    seen: Counter[int] = Counter()
    found = []
    for number in range(batches):
        part, _ = order.turn(number)
        found.append((part, seen[part]))
        seen[part] += 1
    return found


@given(buckets)
@settings(deadline=None)
def test_a_batch_is_the_next_of_its_bucket_s_own_order(order):
    """So every picture of a bucket comes exactly once in each of the bucket's epochs."""
    first = np.cumsum([0, *map(len, order.parts)])
    for number, (part, before) in enumerate(by_hand(order, 20)):
        assert order.turn(number) == (part, before)
        batch = order.at(number * order.batch, order.batch)
        assert np.array_equal(batch - first[part], order.parts[part].at(before * order.batch, order.batch))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(0, 2**32), st.integers(0, 5))
@settings(deadline=None)
def test_in_any_cycle_the_shares_are_exact_and_every_picture_comes_equally_often(counts, seed, cycle):
    order, total = made(tuple(counts), batch=3, seed=seed), sum(counts)
    turns = Counter(order.turn(number)[0] for number in range(cycle * total, (cycle + 1) * total))
    assert [turns[part] for part in range(len(counts))] == counts
    pictures = Counter(order.at(cycle * total * 3, total * 3).tolist())
    assert pictures == dict.fromkeys(range(total), 3)


@given(buckets)
@settings(deadline=None)
def test_shares_hold_all_the_time_to_within_the_depth_of_the_tree_and_no_bucket_starves(order):
    total, depth, seen = sum(order.shares), (len(order.parts) - 1).bit_length(), Counter()
    last = dict.fromkeys(range(len(order.parts)), -1)
    for number in range(200):
        part, before = order.turn(number)
        assert before == seen[part]
        seen[part] += 1
        assert all(abs(seen[p] * total - (number + 1) * share) <= depth * total for p, share in enumerate(order.shares))
        gap, last[part] = number - last[part], number
        assert gap * order.shares[part] <= max(2 * depth, 1) * total + order.shares[part]


@given(buckets, st.integers(0, 10**30))
@settings(deadline=None)
def test_any_batch_is_had_at_once_however_far(order, number):
    """And the next batch of its bucket, which comes within the bound, is the one that follows in the bucket's own count."""
    part, before = order.turn(number)
    total, depth, share = sum(order.shares), (len(order.parts) - 1).bit_length(), order.shares[part]
    assert abs(before * total - number * share) <= depth * total
    bound = 2 * depth * total // share + 1
    if bound < 1_000:
        after = [turn for turn in map(order.turn, range(number + 1, number + 1 + bound)) if turn[0] == part]
        assert after[0] == (part, before + 1)


def test_over_the_seeds_each_batch_is_a_bucket_s_with_the_probability_of_its_share():
    shares = (1, 5, 2, 8, 4)
    for number in (0, 7, 1_000_003):
        turns = Counter(made(shares, seed=seed).turn(number)[0] for seed in range(4_000))
        counts = np.array([turns[part] for part in range(5)])
        assert stats.chisquare(counts, 4_000 * np.array(shares) / 20).pvalue > 1e-4


@given(buckets, st.integers(0, 300), st.lists(st.integers(0, 90), max_size=6))
@settings(deadline=None)
def test_pieces_put_together_are_the_whole(order, start, pieces):
    ends = np.cumsum([start, *pieces])
    parts = [order.at(int(a), int(b - a)) for a, b in pairwise(ends)]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *parts]), order.at(start, sum(pieces)))


@pytest.mark.parametrize("world", WORLDS)
def test_workers_together_read_batches_of_one_bucket(world):
    order = made((50, 7, 120, 1), seed=4)
    first = np.cumsum([0, 50, 7, 120, 1])
    for number in range(100):
        whole = order.at(number * 24, 24)
        parts = [order.at(number * 24 + rank * 24 // world, 24 // world) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts), whole)
        assert len(set(np.searchsorted(first, whole, side="right"))) == 1


def test_threads_and_processes_read_one_order():
    order = made((500, 70, 1_200, 10, 3), seed=9)
    whole = pickle.loads(pickle.dumps(order)).at(0, 24 * 400)
    starts = np.random.default_rng(0).integers(0, 390, 300).tolist()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda n: order.at(24 * n, 24), starts))
    assert all(np.array_equal(part, whole[24 * n : 24 * n + 24]) for n, part in zip(starts, parts, strict=True))
    sent = pickle.dumps(order)
    assert len(sent) < 1_000
    assert pickle.loads(sent) == order
    parts[0][:] = -1  # the caller's to change
    assert np.array_equal(order.at(24 * starts[0], 24), whole[24 * starts[0] : 24 * starts[0] + 24])


def test_wrong_arguments_are_refused():
    order = made((5, 3))
    with pytest.raises(ValueError, match="positions start at 0"):
        order.at(-1, 1)
    with pytest.raises(ValueError, match="start=25 lies within a batch of 24"):
        order.check(25, 24)
    with pytest.raises(ValueError, match="in batches of 24 pictures of one size, not of 12"):
        order.check(24, 12)
    with pytest.raises(ValueError, match="2 buckets with shares"):
        made((5, 3), (1, 0))
    with pytest.raises(ValueError, match="batch=0"):
        made((5, 3), batch=0)
