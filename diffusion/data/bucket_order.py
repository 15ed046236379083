"""The order of pictures of several sizes: whole global batches, each of one bucket, so that a batch is one array.

A bucket is an `Order` of its own.  Which bucket batch j is of, and how many of that bucket came before it, is arithmetic
on (seed, j), as `data.order` is on positions: nothing is listed, and position p stays the p-th picture of the run, place
p mod B of batch p div B, for any number of workers that divides B.

The buckets are halved into a tree.  Of the first j batches of a node with shares l and r, the left child has

    c(j) = floor((j l + phase) / (l + r)),        phase uniform in [0, l + r), from the seed

so its batches are spread evenly [Bresenham 1965], and c is exact: l of every l + r.  So, for a bucket of share s of S:
in any S batches that follow batch k S, s are the bucket's; of the first j it has j s / S, to within the depth of the
tree, d = ceil(log2 of the number of buckets), so one is among any 2 d S / s in a row; and batch j is the bucket's with
probability s / S over the seeds.  Where shares are numbers of pictures, every picture comes equally often.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np

from diffusion.data.order import PHASES, Mixture, Order, joined, random_words

_KEPT = 4  # batches: read-ahead works at the end of one and the start of the next
_PHASE_WORDS = 4  # 256 bits: the phase of a sum of shares below 2^200 is uniform to within 2^-56


@dataclass(frozen=True)
class Buckets:
    """The endless sequence of batches of `batch` pictures, each from one of `parts`, which have `shares` of the batches.

    Picture indices count through the parts.  A part's k-th batch holds its pictures [k batch, (k + 1) batch): it passes
    through epochs of its own, in which every picture of it comes once.
    """

    parts: tuple[Order, ...]
    shares: tuple[int, ...]
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.shares) or min(self.shares) < 1:
            raise ValueError(f"{len(self.parts)} buckets with shares {self.shares}: need one above 0 for each bucket")
        if self.batch < 1 or not 0 <= self.seed < 2**64:
            raise ValueError(f"batch={self.batch} starts at 1, seed={self.seed} at 0")

    def __len__(self) -> int:
        """Pictures in all parts: indices are below this."""
        return sum(map(len, self.parts))

    def at(self, start: int, count: int) -> np.ndarray:
        """Picture indices at positions [start, start + count) of the endless sequence -> (count,) int64.

        Safe to call from several threads.  Raises ValueError for a position before 0.
        """
        return joined(self._from, start, count)

    def turn(self, number: int) -> tuple[int, int]:
        """(part, how many of its batches came before) of batch `number`."""
        low, high, node = 0, len(self.parts), 1
        while high - low > 1:
            middle = (low + high) // 2
            left, all_shares = self._sums[middle] - self._sums[low], self._sums[high] - self._sums[low]
            phase = self._phases[node] % all_shares
            before, after = ((n * left + phase) // all_shares for n in (number, number + 1))
            if after > before:
                high, number, node = middle, before, 2 * node
            else:
                low, number, node = middle, number - before, 2 * node + 1
        return low, number

    def check(self, start: int, batch_size: int) -> None:
        """Raises ValueError where batches of this size, the first one at `start`, would not be of one bucket each."""
        if batch_size != self.batch:
            raise ValueError(f"the order is in batches of {self.batch} pictures of one size, not of {batch_size}")
        if start % self.batch:
            raise ValueError(
                f"start={start} lies within a batch of {self.batch} pictures of one size: start at a multiple of it"
            )

    @cached_property
    def _sums(self) -> list[int]:
        return list(accumulate(self.shares, initial=0))

    @cached_property
    def _first(self) -> list[int]:
        return list(accumulate(map(len, self.parts), initial=0))

    @cached_property
    def _phases(self) -> list[int]:
        """Of each node of the tree, the root being number 1, whose children are 2 and 3."""
        nodes = 2 << (len(self.parts) - 1).bit_length()
        words = random_words(self.seed, PHASES, 0, 0, _PHASE_WORDS * nodes).tobytes()
        size = len(words) // nodes
        return [int.from_bytes(words[n * size : (n + 1) * size], "little") for n in range(nodes)]

    def _from(self, position: int) -> np.ndarray:
        """The sequence from `position` to the end of its batch."""
        number, offset = divmod(position, self.batch)
        return self._batches(number)[offset:]

    @cached_property
    def _batches(self) -> Callable[[int], np.ndarray]:
        return lru_cache(maxsize=_KEPT)(self._batch)

    def _batch(self, number: int) -> np.ndarray:
        """Pictures of a batch, (batch,) int64, read-only."""
        part, before = self.turn(number)
        pictures = self.parts[part].at(before * self.batch, self.batch) + self._first[part]
        pictures.flags.writeable = False
        return pictures

    def __getstate__(self) -> dict:
        return {field.name: self.__dict__[field.name] for field in fields(self)}


AnyOrder = Order | Mixture | Buckets
