"""Which picture comes when: a pure function of position, the same for any batch size and number of workers.

An epoch is a permutation of all pictures.  Shards are permuted and laid end to end; that line is cut into C pieces of
equal length (to within one picture), the canonical streams; within each stream pictures are shuffled in windows; and
the streams take turns, one picture each.  So C shards are open at a time, a batch draws from all of them, and reading
stays nearly sequential.  Epoch e+1 begins where epoch e ends, in mid-batch if need be.

Random numbers are raw outputs of numpy's Philox keyed by (seed, epoch), which numpy promises never to change, and
permutations are their stable argsort; numpy's own shuffles come without that promise.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    """The endless sequence of picture indices.  `counts` are the pictures of each shard, in manifest order; picture i
    is the i-th in that order.
    """

    counts: tuple[int, ...]
    seed: int
    window: int
    streams: int

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"counts={self.counts[:8]}: need at least one shard, each with at least one picture")
        if self.window < 1 or self.streams < 1 or not 0 <= self.seed < 2**64:
            raise ValueError(f"window={self.window} and streams={self.streams} start at 1, seed={self.seed} at 0")

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return sum(self.counts)

    def at(self, start: int, count: int) -> np.ndarray:
        """Picture indices at positions [start, start + count) of the endless sequence -> (count,) int64.

        An epoch's permutation is made on its first use and kept while it is among the last few in use.
        """
        if start < 0 or count < 0:
            raise ValueError(f"at({start}, {count}): positions start at 0")
        pictures = len(self)
        parts, position, end = [np.empty(0, np.int64)], start, start + count
        while position < end:
            epoch, offset = divmod(position, pictures)
            part = _epoch(self, epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)


_SHARDS, _PICTURES = 0, 1  # what a random number is for: the second word of Philox's key


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> np.ndarray:
    """One epoch's permutation, (len(order),) int64, read-only."""
    counts = np.asarray(order.counts, np.int64)
    pictures = int(counts.sum())
    shards = np.argsort(_random(order.seed, epoch, _SHARDS, len(counts)), kind="stable")
    first = np.cumsum(counts) - counts
    line = np.repeat(first[shards] - (np.cumsum(counts[shards]) - counts[shards]), counts[shards]) + np.arange(pictures)
    # the line's place p lies in stream s at depth d: the first `pictures % C` streams are one picture longer
    short, longer = divmod(pictures, order.streams)
    lengths = np.full(order.streams, short, np.int64)
    lengths[:longer] += 1
    stream = np.repeat(np.arange(order.streams), lengths)
    depth = np.arange(pictures) - (np.cumsum(lengths) - lengths)[stream]
    shuffled = np.lexsort((_random(order.seed, epoch, _PICTURES, pictures), depth // order.window, stream))
    result = np.empty(pictures, np.int64)
    result[depth * order.streams + stream] = line[shuffled]
    result.flags.writeable = False
    return result


def _random(seed: int, epoch: int, purpose: int, count: int) -> np.ndarray:
    """(count,) uint64, independent of those of any other seed, epoch or purpose."""
    bits = np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64))
    return bits.random_raw(count)
