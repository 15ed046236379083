"""The order's laws: every epoch a permutation, position alone decides, batches and workers do not."""

import hashlib
import math
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffusion.data.order import CYCLE, Mixture, Order

orders = st.builds(
    Order,
    pictures=st.integers(1, 300),
    block=st.integers(1, 60) | st.integers(200, 400),
    seed=st.integers(0, 2**64 - 1),
    window=st.integers(1, 60) | st.integers(200, 400),
    streams=st.integers(1, 20) | st.integers(200, 400),
)
weights = st.integers(0, 400) | st.floats(1.0, 50.0)
mixtures = st.lists(st.tuples(orders, weights), min_size=1, max_size=5).filter(
    lambda parts: all(w == 0 or w > sum(w for _, w in parts) / 500 for _, w in parts) and any(w for _, w in parts)
)
mixtures = st.builds(lambda parts, seed: Mixture(*zip(*parts, strict=True), seed), mixtures, st.integers(0, 2**32))


@given(orders, st.integers(0, 5) | st.integers(2**31, 2**40))
@settings(deadline=None)
def test_every_epoch_holds_every_picture_once(order, epoch):
    pictures = order.at(epoch * len(order), len(order))
    assert pictures.dtype == np.int64
    assert sorted(pictures.tolist()) == list(range(len(order)))


@given(orders | mixtures, st.integers(0, 5000), st.lists(st.integers(0, 900), max_size=8))
@settings(deadline=None)
def test_pieces_put_together_are_the_whole(order, start, pieces):
    ends = np.cumsum([start, *pieces])
    parts = [order.at(int(a), int(b - a)) for a, b in pairwise(ends)]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *parts]), order.at(start, sum(pieces)))


@given(orders | mixtures, st.integers(1, 4), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 6, 8]))
@settings(deadline=None)
def test_workers_together_read_the_global_batch(order, per_worker, batch, world):
    """Any number of workers: their parts in order of rank are the global batch; nobody else's position is needed."""
    size = per_worker * 24
    whole = order.at(batch * size, size)
    parts = [order.at(batch * size + rank * size // world, size // world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)


def numbers(seed: int, purpose: int, epoch: int, number: int, count: int) -> list[int]:
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, 0, number, epoch], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count).tolist()


def blocks_by_hand(full: int, seed: int, epoch: int) -> tuple[list[int], int]:
    """The permutation of `full` blocks, as a list, and how many of them stand before the short one."""
    side = next(side for side in range(2, 10_000, 2) if side * side >= full)
    slot, *values = numbers(seed, 0, epoch, 0, 1 + 10 * side)
    pairs = {(left, right): (left, right) for left in range(side) for right in range(side)}
    for turn in range(10):
        table = values[turn * side : (turn + 1) * side]
        pairs = {x: (right, (left + table[right]) % side) for x, (left, right) in pairs.items()}
    once = {x[0] * side + x[1]: y[0] * side + y[1] for x, y in pairs.items()}
    result = []
    for x in range(full):
        x = once[x]
        while x >= full:
            x = once[x]
        result.append(x)
    return result, slot % (full + 1)


def by_hand(order: Order, epoch: int) -> list[int]:
    """The same order, written with lists from the module's description."""
    full = order.pictures // order.block
    blocks, slot = blocks_by_hand(full, order.seed, epoch)
    blocks.insert(slot, full)
    line = [i for block in blocks for i in range(block * order.block, (block + 1) * order.block) if i < order.pictures]
    count = min(order.streams, order.pictures)
    streams = []
    for stream in range(count):
        length = order.pictures // count + (stream < order.pictures % count)
        streams.append([line.pop(0) for _ in range(length)])
    for number in range(-(-len(streams[0]) // order.window)):
        begin, end = number * order.window, min((number + 1) * order.window, len(streams[0]))
        keys = numbers(order.seed, 1, epoch, number, count * (end - begin))
        bits = len(f"{end - begin - 1:b}") if end - begin > 1 else 0
        for stream in streams:
            mine, keys = [key >> bits for key in keys[: end - begin]], keys[end - begin :]
            part = stream[begin:end]
            stream[begin:end] = [part[i] for i in sorted(range(len(part)), key=lambda i: (mine[i], i))]
    return [stream[turn] for turn in range(len(streams[0])) for stream in streams if turn < len(stream)]


@given(orders, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_version(order, epoch):
    assert order.at(epoch * len(order), len(order)).tolist() == by_hand(order, epoch)


def test_equals_the_slow_version_over_many_blocks():
    order = Order(pictures=20_003, block=2, seed=8, window=100, streams=7)
    assert order.at(2 * 20_003, 20_003).tolist() == by_hand(order, 2)


@given(orders, st.integers(0, 3))
@settings(deadline=None)
def test_no_picture_is_read_far_from_its_block(order, epoch):
    """A line of B blocks cut into W windows has at most B + W - 1 pieces: so often, at most, a block is opened in a window
    of a stream.  And C windows are open at a time.
    """
    pictures = order.at(epoch * len(order), len(order))
    streams = min(order.streams, len(order))
    position = np.arange(len(order))
    window = (position // streams // order.window) * streams + position % streams
    opened = len(np.unique(np.stack([window, pictures // order.block]), axis=1).T)
    assert opened <= -(-len(order) // order.block) + len(np.unique(window)) - 1


def test_few_blocks_are_open_at_a_time():
    """Of 200 blocks, 4 streams with windows of a block's size have at most three each in any window."""
    order = Order(pictures=5_000, block=25, seed=3, window=25, streams=4)
    blocks = order.at(0, len(order)) // 25
    for start in range(0, len(order), 100):
        assert len(set(blocks[start : start + 100])) <= 4 * 2
    for start in range(len(order) - 100):
        assert len(set(blocks[start : start + 100])) <= 4 * 3


ORDERS = 10_000


def evenly(counts: np.ndarray, degrees: int, factor: float = 1.0) -> bool:
    """Whether Pearson's chi-square of counts expected to be equal is no rarer than one in 10,000 on either side."""
    chi = factor * ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return 1e-4 < stats.chi2.sf(chi, degrees) < 1 - 1e-4


SHUFFLES = {  # of n pictures, each by one part of the construction alone
    "blocks": lambda n: Order(n, block=1, seed=11, window=1, streams=n),
    "window": lambda n: Order(n, block=n, seed=12, window=n, streams=1),
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_all_permutations_come_equally_often(shuffle):
    n = 5
    epochs = SHUFFLES[shuffle](n).at(0, ORDERS * n).reshape(ORDERS, n)
    _, counts = np.unique(epochs @ n ** np.arange(n), return_counts=True)
    permutations = math.factorial(n)
    assert len(counts) == permutations
    assert evenly(counts, permutations - 1)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_places_and_pairs_come_equally_often(shuffle):
    n = 13
    epochs = SHUFFLES[shuffle](n).at(0, ORDERS * n).reshape(ORDERS, n)
    places = np.stack([np.bincount(column, minlength=n) for column in epochs.T])
    assert evenly(places, (n - 1) ** 2, factor=(n - 1) / n)  # rows and columns of a permutation's table sum to 1
    neighbours = np.bincount(epochs[:, 6] * n + epochs[:, 7], minlength=n * n).reshape(n, n)
    assert neighbours.trace() == 0
    assert evenly(neighbours[~np.eye(n, dtype=bool)], n * (n - 1) - 1)
    following = np.bincount(epochs[:-1, 6] * n + epochs[1:, 6], minlength=n * n)  # one epoch and the next
    assert evenly(following, n * n - 1)


def test_each_picture_comes_early_as_often_as_late():
    n, epochs = 24, 4_000  # both parts at work, two windows in each of two streams
    pictures = Order(n, block=3, seed=5, window=6, streams=2).at(0, epochs * n).reshape(epochs, n)
    places = np.stack([np.bincount(column, minlength=n) for column in pictures.T])
    # a block's pictures are dependent, so the table has fewer degrees of freedom than its cells: look at each alone
    assert np.abs(places - epochs / n).max() < 5 * np.sqrt(epochs / n * (1 - 1 / n))


def test_the_short_block_comes_anywhere():
    order = Order(pictures=9, block=4, seed=6, window=1, streams=1)
    places = np.argmax(order.at(0, 1_000 * 9).reshape(1_000, 9) == 8, axis=1)
    assert set(places) == {0, 4, 8}
    assert evenly(np.bincount(places)[[0, 4, 8]], 2)


def test_seeds_and_epochs_differ_and_repeat():
    order = Order(130, block=50, seed=1, window=64, streams=4)
    first, second = order.at(0, 130), order.at(130, 130)
    assert (first != second).mean() > 0.9
    assert (first != Order(130, block=50, seed=2, window=64, streams=4).at(0, 130)).mean() > 0.9
    assert np.array_equal(first, Order(130, block=50, seed=1, window=64, streams=4).at(0, 130))


def test_a_billion_pictures_take_kilobytes():
    """Two stretches of 8 x 1,024 int64 (128 KiB) and two tables for a million blocks (157 KiB) stay; a stretch in the
    making takes a few times its size.
    """
    tracemalloc.start()
    try:
        order = Order(pictures=1_000_000_007, block=1_000, seed=4, window=1_024, streams=8)
        seen = [order.at(start, 256) for start in range(0, 30_000_000_000, 999_999_999)]
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 320 * 1024
    assert most < 1024 * 1024
    pictures = np.concatenate(seen)
    assert (pictures.min(), pictures.max()) >= (0, 900_000_000)
    assert pictures.max() < len(order)


def test_threads_read_one_order_together():
    order = Order(pictures=5_003, block=40, seed=9, window=200, streams=4)
    mixture = Mixture((order, Order(700, 20, 3, 30, 2)), (3, 1), seed=2)
    starts = np.random.default_rng(0).integers(0, 30_000, 400).tolist()
    for sequence in (order, mixture):
        whole = pickle.loads(pickle.dumps(sequence)).at(0, 31_000)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda start, sequence=sequence: sequence.at(start, 100), starts))
        assert all(np.array_equal(part, whole[s : s + 100]) for s, part in zip(starts, parts, strict=True))


def test_an_order_in_use_travels_to_other_processes_without_what_it_remembers():
    mixture = Mixture((Order(5_003, 40, 9, 50, 4), Order(700, 20, 3, 30, 2)), (3, 1), seed=2)
    pictures = mixture.at(10, 50)
    sent = pickle.dumps(mixture)
    assert len(sent) < 500
    assert pickle.loads(sent) == mixture
    assert np.array_equal(pickle.loads(sent).at(10, 50), pictures)


def test_pictures_are_the_callers_to_change():
    for sequence in (Order(100, 10, 0, 50, 2), Mixture((Order(100, 10, 0, 50, 2),), (1,), 0)):
        pictures = sequence.at(0, 10)
        before = pictures.copy()
        pictures[:] = -1
        assert np.array_equal(sequence.at(0, 10), before)


@given(mixtures)
def test_quotas_are_the_shares_to_within_one_slot(mixture):
    total = sum(map(Fraction, mixture.weights))
    assert sum(mixture.quotas) == CYCLE
    for quota, weight in zip(mixture.quotas, mixture.weights, strict=True):
        assert abs(quota - CYCLE * Fraction(weight) / total) < 1
        assert (quota > 0) == (weight > 0)


def test_round_shares_are_kept_exactly_and_ties_go_to_the_first():
    part = Order(10, 2, 0, 5, 2)
    assert Mixture((part,) * 3, (0.5, 0.3, 0.2), 0).quotas == (500, 300, 200)
    assert Mixture((part,) * 3, (1, 1, 1), 0).quotas == (334, 333, 333)
    assert Mixture((part,) * 3, (2, 0, 6), 0).quotas == (250, 0, 750)


@given(mixtures, st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_mixture_draws_each_part_in_its_own_order(mixture, number):
    """So every picture of a part comes exactly once in each of the part's epochs, and the shares hold in each cycle."""
    pictures = mixture.at(number * CYCLE, 2 * CYCLE)
    first = 0
    for part, quota in zip(mixture.parts, mixture.quotas, strict=True):
        mine = pictures[(pictures >= first) & (pictures < first + len(part))]
        assert np.array_equal(mine - first, part.at(number * quota, 2 * quota))
        first += len(part)
    assert first == len(mixture)


def mixture_by_hand(mixture: Mixture, stop: int) -> list[int]:
    """Positions 0 to `stop`, one by one, each part remembering how far it has come."""
    first, taken, result = [0], [0] * len(mixture.parts), []
    for part in mixture.parts:
        first.append(first[-1] + part.pictures)
    for number in range(-(-stop // CYCLE)):
        slots = [part for part, quota in enumerate(mixture.quotas) for _ in range(quota)]
        keys = numbers(mixture.seed, 2, 0, number, CYCLE)
        for slot in sorted(range(CYCLE), key=lambda slot: (keys[slot], slot)):
            part = slots[slot]
            result.append(first[part] + int(mixture.parts[part].at(taken[part], 1)[0]))
            taken[part] += 1
    return result[:stop]


def test_a_mixture_equals_its_slow_version():
    parts = (Order(70, 9, 1, 20, 3), Order(900, 50, 2, 64, 4), Order(1, 1, 3, 1, 1))
    mixture = Mixture(parts, (0.25, 2.0, 0.004), seed=5)
    assert mixture.at(0, 3_500).tolist() == mixture_by_hand(mixture, 3_500)


def test_parts_of_a_mixture_come_anywhere_in_a_cycle():
    part = Order(5_000, 5_000, seed=1, window=5_000, streams=1)
    mixture = Mixture((part, part), (1, 4), seed=3)
    rare = mixture.at(0, 1_000 * CYCLE).reshape(1_000, CYCLE) < len(part)
    assert (rare.sum(1) == 200).all()
    places = rare.sum(0)
    # drawn without repeat: each place's count has variance 1,000 x 0.2 x 0.8, and they sum to a constant
    assert evenly(places, CYCLE - 1, factor=1 / 0.8)


@pytest.mark.parametrize(
    ("sequence", "start", "digest"),
    [
        (Order(1_000, 64, seed=0, window=32, streams=4), 1_500, "89133e8808db0ae3"),
        (Order(1_000_000_007, 1_000, seed=2**63, window=1_024, streams=8), 10**12, "60510396699525ce"),
        (
            Mixture((Order(700, 64, 1, 32, 4), Order(5_000, 256, 2, 100, 8)), (0.3, 0.7), seed=3),
            999_500,
            "1132cf801e72c1ae",
        ),
    ],
    ids=["small", "large", "mixture"],
)
def test_published_runs_keep_their_order(sequence, start, digest):
    """No specification, but an alarm: where numpy or an edit changes the sequence, no published run can be resumed."""
    pictures = sequence.at(start, 10_000)
    assert hashlib.sha256(pictures.astype("<i8").tobytes()).hexdigest()[:16] == digest


def test_wrong_arguments_are_refused():
    right = {"pictures": 3, "block": 2, "seed": 0, "window": 1, "streams": 1}
    wrongs = ({"pictures": 0}, {"block": 0}, {"window": 0}, {"streams": 0}, {"seed": -1}, {"seed": 2**64})
    for wrong in wrongs:
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}={next(iter(wrong.values()))}"):
            Order(**{**right, **wrong})
    order = Order(**right)
    for sequence in (order, Mixture((order,), (1.0,), 0)):
        with pytest.raises(ValueError, match="positions start at 0"):
            sequence.at(-1, 1)
        with pytest.raises(ValueError, match="positions start at 0"):
            sequence.at(1, -1)


def test_wrong_mixtures_are_refused():
    part = Order(3, 2, 0, 1, 1)
    with pytest.raises(ValueError, match="2 parts and 1 weights"):
        Mixture((part, part), (1.0,), 0)
    with pytest.raises(ValueError, match="0 parts"):
        Mixture((), (), 0)
    for wrong in ((1.0, -1.0), (0.0, 0.0), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="one at least is above 0"):
            Mixture((part, part), wrong, 0)
    with pytest.raises(ValueError, match=r"weight 0.001 of 10.001 .* at least 0.010001, or 0 to leave it out"):
        Mixture((part, part), (10.0, 0.001), 0)
    with pytest.raises(ValueError, match="seed=-1"):
        Mixture((part,), (1.0,), -1)
