"""The Frechet distance of a sample from a fixed reference: of all of it, and without blocks of it, for the distance's error
and its limit.  The memory is that of some (D, D), however many pictures there are.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.evaluation.metrics.frechet import ROWS, Gaussian, checked, round_off
from diffusion.evaluation.metrics.intervals import jackknife_error
from diffusion.evaluation.metrics.jackknife import BLOCKS, PAIRS, error_by_pairs


@dataclass(frozen=True)
class Distance:
    """A Frechet distance of a sample.  `left_out`: the distance without each block of the jackknife."""

    value: float
    standard_error: float
    left_out: tuple[float, ...]


class Moments(NamedTuple):
    """Of some pictures, features less the reference's mean: their number, their sum (D,) and that of |f|^2, float64."""

    n: int
    sum: Tensor
    squares: Tensor

    @classmethod
    def of(cls, centred: Tensor) -> "Moments":
        flat = centred.flatten()
        return cls(len(centred), centred.sum(dim=0), flat.dot(flat))

    def merge(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def without(self, part: "Moments") -> "Moments":
        return Moments(*(a - b for a, b in zip(self, part, strict=True)))


def _merged(parts: Iterable[Moments]) -> Moments:
    return reduce(Moments.merge, parts)


Blocks = tuple[int, ...]

# without some blocks, and the moments of the rest -> C^T C or C C^T, where C are the rest's projected and centred features
Product = Callable[[Blocks, Moments], Tensor]


class Rest(NamedTuple):
    """What is left of a sample without some blocks."""

    left: Blocks
    moments: Moments
    matrix: Tensor  # C C^T of few pictures, else C^T C
    rank: int  # of the matrix of all of them


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample beside a reference.

    With C the centred features of n pictures times the reference's root, Tr (S_a S_b)^(1/2) is the sum of the singular
    values of C / sqrt(n - 1), hence of roots of the eigenvalues of C^T C, to which each block adds its own, and of C C^T,
    which is smaller where there are few pictures.
    """

    reference: Gaussian  # whose root is (D, D) at most
    features: Tensor  # of any float type; may lie in a file
    rows: Tensor  # (N,) int64, which of them are the sample's
    blocks: int  # the k-th holds every blocks-th picture from the k-th on

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def few(self) -> bool:
        """Whether the products of each two pictures are the smaller matrix by far."""
        return 2 * len(self) <= self.reference.root.shape[1]

    def left_out(self, pairs: Iterable[Blocks] = ()) -> tuple[float, list[float]]:
        """The distance; without each block in turn where there are several, and without each of these pairs of them."""
        singles = [(block,) for block in range(self.blocks)] if self.blocks > 1 else []
        values = list(map(self.distance, self.rests([*singles, *pairs])))  # which holds no rest while the next is made
        return values[0], values[1:]

    def rests(self, groups: Iterable[Blocks]) -> Iterator[Rest]:
        """All of the sample, and what is left of it without each group of blocks."""
        moments, product = self._of_few() if self.few else self._of_sums()
        whole = _merged(moments)
        rank = _rank(product((), whole))
        for left in ((), *groups):
            rest = whole.without(_merged(moments[block] for block in left)) if left else whole
            yield Rest(left, rest, product(left, rest), rank)

    def distance(self, rest: Rest) -> float:
        """Of what is left."""
        of, eigenvalues = rest.moments, torch.linalg.eigvalsh(rest.matrix)
        if of.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, there are {of.n}")
        trace = (of.squares - of.sum.square().sum() / of.n) / (of.n - 1)
        overlap = eigenvalues[-min(rest.rank, of.n - 1) :].clamp(min=0).sqrt().sum() / math.sqrt(of.n - 1)
        shift = (of.sum / of.n).square().sum()
        return max(0.0, float(shift + trace + self.reference.trace - 2 * overlap))

    def _of_few(self) -> tuple[list[Moments], Product]:
        """The moments of each block, and the products of each two pictures."""
        block = torch.arange(len(self)) % self.blocks
        centred = checked(self.features[self.rows]) - self.reference.mean
        moments = [Moments.of(centred[block == k]) for k in range(self.blocks)]
        projected = centred @ self.reference.root
        products = projected @ projected.T

        def product(left: Blocks, _: Moments) -> Tensor:
            kept = (~torch.isin(block, torch.tensor(left, dtype=torch.int64))).nonzero().flatten()
            found = products[kept[:, None], kept]
            mean = found.mean(dim=0)
            return found.sub_(mean).sub_((mean - mean.mean())[:, None])

        return moments, product

    def _of_sums(self) -> tuple[list[Moments], Product]:
        """Likewise, and the sum over the blocks: taken again of those that are left out, for all would fill the memory."""
        total = self._nothing()
        moments = [_merged(self._add(block, total)) for block in range(self.blocks)]

        def product(left: Blocks, rest: Moments) -> Tensor:
            found = self._nothing()
            for block in left:
                _merged(self._add(block, found))
            mean = rest.sum @ self.reference.root / rest.n
            return torch.sub(total, found, out=found).addr_(mean, mean, alpha=-float(rest.n))

        return moments, product

    def _nothing(self) -> Tensor:
        wide = self.reference.root.shape[1]
        return torch.zeros(wide, wide, dtype=torch.float64)

    def _add(self, block: int, total: Tensor) -> Iterable[Moments]:
        """Add a block's products about the reference's mean to a sum (R, R), a chunk at a time; their moments."""
        for chunk in self.rows[block :: self.blocks].split(ROWS):
            centred = checked(self.features[chunk]).sub_(self.reference.mean)
            projected = centred @ self.reference.root
            total.addmm_(projected.T, projected)
            yield Moments.of(centred)


def _rank(matrix: Tensor) -> int:
    """Of C^T C, at least 1; the matrix is overwritten.  An eigenvalue of it that is 0 comes out as the round-off of the
    largest, whose root is not small; one that is as small by the unlike sizes of C's columns is not 0: so these are made
    equal first."""
    sizes = matrix.diagonal().clamp(min=0).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    eigenvalues = torch.linalg.eigvalsh(matrix.div_(sizes).div_(sizes[:, None]))
    return max(1, int((eigenvalues > round_off(eigenvalues)).sum()))


def beside(reference: Gaussian, features: Tensor, rows: Tensor | None = None, *, blocks: int = BLOCKS) -> Sample:
    """A sample's features (N, D) beside a reference.  rows: which of them, int64; None for all."""
    if features.shape[1:] != reference.mean.shape:
        raise ValueError(f"{features.shape[1]} and {len(reference.mean)} features a picture: not of the same extractor")
    rows = torch.arange(len(features)) if rows is None else rows
    root = reference.root
    if root.shape[0] < root.shape[1]:  # a square one has the same covariance
        root = torch.linalg.qr(root.T, mode="r").R.T
    return Sample(Gaussian(reference.mean, root), features, rows, max(1, min(blocks, len(rows) // 2)))


def frechet_to(reference: Gaussian, features: Tensor, *, blocks: int = BLOCKS) -> Distance:
    """The distance of a sample's features (N, D) from a fixed reference, and its standard error over such samples."""
    return jackknifed(beside(reference, features, blocks=blocks))


def jackknifed(sample: Sample) -> Distance:
    """Delete-a-block jackknife: without every blocks-th picture in turn; where pictures are sorted by class, each block has
    the classes in proportion.  Not a bootstrap: a resample has only 63 % distinct pictures, hence a covariance of lower
    rank, and lies further from the reference by much more than the spread in question.  The jackknife errs to the safe
    side [Efron & Stein 1981]: hardly where there are more pictures than features, by up to sqrt 2 where there are fewer;
    of BLOCKS blocks most of that is taken off, by pairs of them.
    """
    if sample.blocks < 2:
        raise ValueError(f"{len(sample)} pictures are too few for a standard error: draw at least 4")
    if sample.blocks != BLOCKS:
        value, left_out = sample.left_out()
        return Distance(value, jackknife_error(left_out), tuple(left_out))
    value, without = sample.left_out(PAIRS)
    return Distance(value, error_by_pairs((value, *without)), tuple(without[:BLOCKS]))
