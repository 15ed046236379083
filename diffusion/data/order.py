"""Which picture comes when: a pure function of position, the same for any batch size and number of workers.

An epoch is a permutation of all pictures.  Blocks of neighbours (nominally: shards) are permuted and laid end to end;
that line is cut into C pieces of equal length (to within one picture), the canonical streams; within each stream
pictures are shuffled in windows; and the streams take turns, one picture each.  So about C blocks are open at a time, a
batch draws from all of them, and reading stays nearly sequential.  Epoch e+1 begins where epoch e ends, in mid-batch if
need be.

Nothing is listed for a whole epoch.  Window v of all streams fills positions [v C window, (v + 1) C window) of the
epoch: such a *stretch* is made on its first use, for any v of any epoch, and the last two are kept.  That is all the
memory there is, 16 C window bytes, beside the tables of the blocks' permutation, 80 sqrt(blocks) bytes an epoch.  To make
a stretch takes some 0.1 ms and 40 ns a picture, so it should hold a thousand pictures or more.

Random numbers are raw outputs of numpy's Philox, keyed by seed and purpose and counted from (epoch, stretch), which
numpy promises never to change; numpy's own shuffles come without that promise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from math import isfinite, isqrt

import numpy as np

CYCLE = 1_000  # positions of a mixture among which its parts are shared out
# what a random number is for: the second word of Philox's key
_BLOCKS, _PICTURES, _SLOTS, PHASES = 0, 1, 2, 3
_ROUNDS = 10
_KEPT = 2  # pieces of a sequence: read-ahead works at the end of one and the start of the next


@dataclass(frozen=True)
class Order:
    """The endless sequence of picture indices, 0 to `pictures` - 1, in blocks of `block` (the last may be short)."""

    pictures: int
    block: int
    seed: int
    window: int
    streams: int

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.block < 1:
            raise ValueError(f"pictures={self.pictures}, block={self.block}: an order needs at least one of each")
        if self.window < 1 or self.streams < 1 or not 0 <= self.seed < 2**64:
            raise ValueError(f"window={self.window} and streams={self.streams} start at 1, seed={self.seed} at 0")

    def __len__(self) -> int:
        """Pictures in an epoch."""
        return self.pictures

    def at(self, start: int, count: int) -> np.ndarray:
        """Picture indices at positions [start, start + count) of the endless sequence -> (count,) int64.

        Safe to call from several threads.  Raises ValueError for a position before 0.
        """
        return joined(self._from, start, count)

    def _from(self, position: int) -> np.ndarray:
        """The sequence from `position` to the end of its stretch."""
        epoch, place = divmod(position, self.pictures)
        number, offset = divmod(place, self.window * min(self.streams, self.pictures))
        return self._stretches(epoch, number)[offset:]

    @cached_property
    def _stretches(self) -> Callable[[int, int], np.ndarray]:
        return lru_cache(maxsize=_KEPT)(partial(_stretch, self))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_stretches"}


@dataclass(frozen=True)
class Mixture:
    """Several orders over one sequence, `weights` their shares of it; picture indices count through the parts.

    Each cycle of `CYCLE` positions has the same number of slots for a part (`quotas`), shuffled.  The parts pass through
    epochs of their own: a part's k-th slot holds the k-th picture of its order, so all its pictures come equally often.
    A part of weight 0 is never drawn.
    """

    parts: tuple[Order, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.parts or len(self.parts) != len(self.weights):
            raise ValueError(f"{len(self.parts)} parts and {len(self.weights)} weights: need one weight for each part")
        if not all(isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise ValueError(f"weights={self.weights}: a weight is a number from 0 on, and one at least is above 0")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed}: seeds start at 0")
        for weight, quota in zip(self.weights, self.quotas, strict=True):
            if weight and not quota:
                raise ValueError(
                    f"weight {weight} of {sum(self.weights)} is less than one picture in {CYCLE}, so this part would"
                    f" never be drawn: give it at least {sum(self.weights) / CYCLE:g}, or 0 to leave it out"
                )

    @cached_property
    def quotas(self) -> tuple[int, ...]:
        """Each part's slots in a cycle: whole numbers nearest to its share, by largest remainder, ties to the first."""
        total = sum(map(Fraction, self.weights))
        shares = [CYCLE * Fraction(weight) / total for weight in self.weights]
        quotas = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda part: quotas[part] - shares[part])
        for part in by_remainder[: CYCLE - sum(quotas)]:
            quotas[part] += 1
        return tuple(quotas)

    def __len__(self) -> int:
        """Pictures in all parts: indices are below this."""
        return sum(map(len, self.parts))

    def at(self, start: int, count: int) -> np.ndarray:
        """Picture indices at positions [start, start + count) of the endless sequence -> (count,) int64.

        Safe to call from several threads.  Raises ValueError for a position before 0.
        """
        return joined(self._from, start, count)

    def _from(self, position: int) -> np.ndarray:
        """The sequence from `position` to the end of its cycle."""
        number, offset = divmod(position, CYCLE)
        return self._cycles(number)[offset:]

    @cached_property
    def _cycles(self) -> Callable[[int], np.ndarray]:
        return lru_cache(maxsize=_KEPT)(partial(_cycle, self))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_cycles"}


def joined(piece: Callable[[int], np.ndarray], start: int, count: int) -> np.ndarray:
    """`count` elements of the sequence from `start`, newly allocated.  `piece(p)` holds some of it from position p on."""
    if start < 0 or count < 0:
        raise ValueError(f"at({start}, {count}): positions start at 0")
    parts, position, end = [piece(start)[:count]], start, start + count
    while (position := position + len(parts[-1])) < end:
        parts.append(piece(position)[: end - position])
    return np.concatenate(parts) if len(parts) > 1 else parts[0].copy()


def _stretch(order: Order, epoch: int, number: int) -> np.ndarray:
    """Pictures of window `number` of all streams, which take turns -> (streams x window,) int64, read-only; shorter at
    the end of the epoch.
    """
    streams = min(order.streams, order.pictures)
    short, longer = divmod(order.pictures, streams)  # streams below `longer` have one picture more
    depth = number * order.window  # of the window's first picture in its stream
    window = min(order.window, short + (longer > 0) - depth)
    stream = np.arange(streams)
    first = stream * short + np.minimum(stream, longer) + depth  # places of the windows' first pictures on the line
    # sorting random numbers whose low bits are replaced by their place gives the stable argsort of the high bits
    low = np.uint64(2 ** (window - 1).bit_length() - 1)
    keys = random_words(order.seed, _PICTURES, epoch, number, streams * window).reshape(streams, window)
    keys = keys & ~low | np.arange(window, dtype=np.uint64)
    if depth + window > short:  # what the shorter streams lack stays last, and is cut off below
        keys[longer:, -1] |= ~low
    keys.sort(axis=1)
    pictures = _on_line(order, epoch, first, (keys & low).astype(np.int64))
    result = pictures.T.reshape(-1)[: order.pictures - depth * streams]
    result.flags.writeable = False
    return result


def _on_line(order: Order, epoch: int, first: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Pictures at places first (C,) + offsets (C, window) of the line of permuted blocks -> (C, window) int64."""
    block = order.block
    full, rest = divmod(order.pictures, block)
    tables, slot_of_short = _tables(order.seed, epoch, full)
    begin = slot_of_short * block  # the short block fills [begin, begin + rest) of the line
    places = first[:, None] + offsets
    moved = np.where(places < begin + rest, places, places - rest)  # where they would be without it
    slots = moved // block
    lowest = np.where(first < begin + rest, first, first - rest) // block
    span = lowest[:, None] + np.arange((offsets.shape[1] - 1) // block + 2)  # all slots that a window may touch
    blocks = _permuted(tables, full, np.minimum(span, max(full - 1, 0)))
    number = np.take_along_axis(blocks, slots - lowest[:, None], axis=1)
    if rest:
        number[(places >= begin) & (places < begin + rest)] = full
    return number * block + (moved - slots * block)


def _permuted(tables: np.ndarray, count: int, x: np.ndarray) -> np.ndarray:
    """A random permutation of [0, count) at each x: a Feistel network on pairs of digits to the base of its side, with
    addition in place of exclusive or, repeated until the result is below `count`.

    [Luby and Rackoff 1988; Black and Rogaway 2002, Sec. 5: a generalized Feistel network, and cycle walking].  The
    rounds' functions are tables of random numbers, so the proofs hold as they stand.  The side is even: with an odd one
    every permutation of the pairs would have the same parity, and small counts would show it.
    """
    side = tables.shape[1]
    out = x
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = np.divmod(out[outside], side)
        for table in tables:
            left, right = right, (left + table[right]) % side
        out = out.copy()
        out[outside] = left * side + right
        outside = out >= max(count, 1)
    return out


@lru_cache(maxsize=_KEPT)
def _tables(seed: int, epoch: int, full: int) -> tuple[np.ndarray, int]:
    """An epoch's tables for `_permuted` over `full` blocks, (rounds, side) int64, and the slot of the short block: the
    number of full blocks before it.
    """
    side = 2 * (isqrt(max(full - 1, 0) // 4) + 1)  # the smallest even number with side^2 >= full
    numbers = random_words(seed, _BLOCKS, epoch, 0, 1 + _ROUNDS * side)
    return (numbers[1:] % np.uint64(side)).astype(np.int64).reshape(_ROUNDS, side), int(numbers[0]) % (full + 1)


def _cycle(mixture: Mixture, number: int) -> np.ndarray:
    """Pictures of cycle `number` of a mixture -> (CYCLE,) int64, read-only."""
    keys = random_words(mixture.seed, _SLOTS, 0, number, CYCLE)
    part = np.repeat(np.arange(len(mixture.parts)), mixture.quotas)[np.argsort(keys, kind="stable")]
    result = np.empty(CYCLE, np.int64)
    first = accumulate(map(len, mixture.parts), initial=0)
    for k, (order, quota, start) in enumerate(zip(mixture.parts, mixture.quotas, first, strict=False)):
        result[part == k] = start + order.at(number * quota, quota)
    result.flags.writeable = False
    return result


def random_words(seed: int, purpose: int, epoch: int, number: int, count: int) -> np.ndarray:
    """(count,) uint64, independent of those of any other seed, purpose, epoch or number."""
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, 0, number, epoch], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
