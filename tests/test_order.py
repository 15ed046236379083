"""The order's laws: every epoch a permutation, position alone decides, batches and workers do not."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.order import Order

orders = st.builds(
    Order,
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    window=st.integers(1, 60),
    streams=st.integers(1, 20),
)


@given(orders, st.integers(0, 5))
def test_every_epoch_holds_every_picture_once(order, epoch):
    pictures = order.at(epoch * len(order), len(order))
    assert pictures.dtype == np.int64
    assert sorted(pictures.tolist()) == list(range(sum(order.counts)))


@given(orders, st.integers(0, 500), st.lists(st.integers(0, 90), max_size=8))
def test_pieces_put_together_are_the_whole(order, start, pieces):
    ends = np.cumsum([start, *pieces])
    parts = [order.at(int(a), int(b - a)) for a, b in pairwise(ends)]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *parts]), order.at(start, sum(pieces)))


@given(orders, st.integers(1, 4), st.integers(0, 3), st.sampled_from([1, 2, 4, 8]))
def test_workers_together_read_the_global_batch(order, per_worker, batch, world):
    """Any number of workers: their parts in order of rank are the global batch; nobody else's position is needed."""
    size = per_worker * 8
    whole = order.at(batch * size, size)
    parts = [order.at(batch * size + rank * size // world, size // world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)


def by_hand(order: Order, epoch: int) -> list[int]:
    """The same order, written with lists from the module's description."""
    total = sum(order.counts)
    word = np.array([0, 0, 0, epoch], np.uint64)
    keys = np.random.Philox(key=np.array([order.seed, 0], np.uint64), counter=word).random_raw(len(order.counts))
    first = [sum(order.counts[:shard]) for shard in range(len(order.counts))]
    line = []
    for shard in sorted(range(len(order.counts)), key=lambda shard: (keys[shard], shard)):
        line += range(first[shard], first[shard] + order.counts[shard])
    keys = np.random.Philox(key=np.array([order.seed, 1], np.uint64), counter=word).random_raw(total)
    streams, start = [], 0
    for stream in range(order.streams):
        length = total // order.streams + (stream < total % order.streams)
        places = list(range(start, start + length))
        shuffled = []
        for window in range(0, length, order.window):
            shuffled += sorted(places[window : window + order.window], key=lambda place: (keys[place], place))
        streams.append([line[place] for place in shuffled])
        start += length
    turns = range(max(len(stream) for stream in streams))
    return [stream[turn] for turn in turns for stream in streams if turn < len(stream)]


@given(orders, st.integers(0, 3))
@settings(max_examples=60)
def test_equals_the_slow_version(order, epoch):
    assert order.at(epoch * len(order), len(order)).tolist() == by_hand(order, epoch)


def test_seeds_and_epochs_differ_and_repeat():
    order = Order((50, 50, 30), seed=1, window=64, streams=4)
    first, second = order.at(0, 130), order.at(130, 130)
    assert (first != second).mean() > 0.9
    assert (first != Order((50, 50, 30), seed=2, window=64, streams=4).at(0, 130)).mean() > 0.9
    assert np.array_equal(first, Order((50, 50, 30), seed=1, window=64, streams=4).at(0, 130))


def test_no_picture_is_read_far_from_its_shard():
    """Reading stays near-sequential: of 200 shards, 4 streams with small windows have few open at any time."""
    order = Order((25,) * 200, seed=3, window=25, streams=4)
    shards = order.at(0, len(order)) // 25
    for start in range(0, len(order), 100):
        assert len(set(shards[start : start + 100])) <= 4 * 3


def test_each_picture_comes_early_as_often_as_late():
    order = Order((8, 8, 8), seed=5, window=8, streams=2)
    epochs = 2_000
    places = np.argsort(order.at(0, epochs * 24).reshape(epochs, 24), axis=1)  # place of each picture in each epoch
    # the mean of 2,000 uniform places on 0..23 has a standard error of 6.9 / sqrt(2000) = 0.155
    assert np.abs(places.mean(0) - 11.5).max() < 5 * 0.155


def test_wrong_arguments_are_refused():
    for wrong in ({"counts": ()}, {"counts": (3, 0)}, {"window": 0}, {"streams": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"counts|window"):
            Order(**{"counts": (3,), "seed": 0, "window": 1, "streams": 1, **wrong})
    with pytest.raises(ValueError, match="positions start at 0"):
        Order((3,), 0, 1, 1).at(-1, 1)
