"""Batch sizes in which a row's answer does not depend on the batch, proven by trial before the first request.

Many kernels choose another order of summation for another number of rows, so the same picture computed in another
batch would differ in its last bits.  Which sizes agree depends on the network, the precision and the machine.
So every size is tried against the reference size, and only those that give the same bits are ever used.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.sampler import Denoise, Query
from diffusion.threads import rest

REFERENCE = 8  # never the number of slots: a picture must not depend on how large a server drew it
LARGEST = 64
_ROUNDS, _PATIENCE_S = 4, 1.0  # of measuring how long the calls take
_NEARLY = 0.9  # of the most rows a second


class NotReproducible(RuntimeError):
    """The network gives other bits for the same row asked twice: nothing can be promised."""


@dataclass(frozen=True)
class Ladder:
    """The proven sizes, ascending, and the seconds one call of each took on this machine.

    The seconds choose between plans of equal result, so they change when a picture comes, never what it is.
    """

    sizes: tuple[int, ...]
    seconds: dict[int, float]
    _plans: dict[int, list[int]] = field(default_factory=lambda: {0: []}, repr=False)

    @property
    def knee(self) -> int:
        """The smallest size that answers nearly as many rows a second as the best: larger calls only take longer."""
        best = max(size / self.seconds[size] for size in self.sizes)
        return next(size for size in self.sizes if size / self.seconds[size] >= _NEARLY * best)

    def told(self) -> str:
        """The measured costs, for people."""
        return ", ".join(f"{size}: {self.seconds[size] * 1000:.3g} ms" for size in self.sizes)

    def plan(self, rows: int) -> list[int]:
        """The cheapest calls that hold `rows` rows: sizes, of which only the last may have to be padded."""
        for count in range(1, rows + 1):
            if count not in self._plans:
                options = [[*self._plans[max(0, count - size)], size] for size in self.sizes]
                self._plans[count] = sorted(min(options, key=self.cost), reverse=True)
        return self._plans[rows]

    def cost(self, plan: list[int]) -> float:
        """Seconds that these calls take."""
        return sum(self.seconds[size] for size in plan)

    def answer(self, denoise: Denoise, query: Query) -> Tensor:
        """D(x; sigma) of every row of the query, each with the bits it would have alone.  Returns (B, C, H, W)."""
        answers, start = [], 0
        for size in self.plan(len(query.x)):
            answers.append(_call(denoise, query, torch.arange(start, start + size)))
            start += size
        return torch.cat(answers)[: len(query.x)]


def _call(denoise: Denoise, query: Query, rows: Tensor) -> Tensor:
    """One network call on these rows; a row number beyond the query's end repeats its last row as padding."""
    rows = rows.clamp(max=len(query.x) - 1).to(query.x.device)
    return denoise(query.x[rows], query.sigma[rows], **{name: value[rows] for name, value in query.cond.items()})


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))  # not ==: NaN is to equal itself, -0 not 0


@torch.no_grad()
def prove(denoise: Denoise, draw: Callable[[int, int], Query], *, largest: int = LARGEST, trials: int = 2) -> Ladder:
    """Try the powers of two from 2 to `largest` and keep those whose rows have the reference size's bits.

    One row is not among them, though it may pass: a matrix of one row is multiplied by other kernels, and in bf16 their
    sums round differently so seldom, in one of 512 rows of a small network, that trials do not find it.

    draw(rows, trial) gives a query with that many rows like those of real requests.  In each trial every size sees the
    same rows in another order, so slot and neighbours change too.  Should rows at the reference size depend on their
    neighbours, one row a call is the reference.  Raises NotReproducible if even that differs from time to time.
    """
    if not 1 <= largest <= LARGEST:
        raise ValueError(f"largest={largest}: give 1 to {LARGEST} rows a network call")
    candidates = sorted({REFERENCE, *(2**k for k in range(1, LARGEST.bit_length()) if 2**k <= largest)})
    pools = [draw(max(candidates), trial) for trial in range(trials)]
    seconds: dict[int, float] = {}

    def answers(pool: Query, size: int, seed: int) -> Tensor:
        order = torch.randperm(len(pool.x), generator=torch.Generator().manual_seed(seed))
        parts = []
        for rows in order.split(size):
            start = time.perf_counter()
            parts.append(_call(denoise, pool, rows))
            if pool.x.is_cuda:
                torch.cuda.synchronize()
            took = time.perf_counter() - start
            seconds[size] = min(took, seconds.get(size, float("inf")))
            rest(took)
        return torch.cat(parts)[order.argsort().to(pool.x.device)]

    def agreeing(reference: int) -> tuple[int, ...]:
        expected = [answers(pool, reference, 0) for pool in pools]
        return tuple(
            size
            for size in sorted({reference, *candidates})
            if all(_same_bits(answers(pool, size, 1 + size), e) for pool, e in zip(pools, expected, strict=True))
        )

    sizes = agreeing(REFERENCE)
    if REFERENCE not in sizes:
        sizes = agreeing(1)
        if 1 not in sizes:
            raise NotReproducible(
                "the network answers the same row with other bits when asked again, so no picture could be drawn twice."
                " Choose deterministic kernels (torch.use_deterministic_algorithms) or another precision"
            )
    began = time.perf_counter()
    for _ in range(_ROUNDS):  # in turns, so that what else the machine does is not one size's alone
        for size in sizes:
            answers(Query(pools[0].x[:size], pools[0].sigma[:size], _first(pools[0].cond, size)), size, 0)
        if time.perf_counter() - began > _PATIENCE_S:
            break
    return Ladder(sizes, {size: seconds[size] for size in sizes})


def _first(cond: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: value[:rows] for name, value in cond.items()}
