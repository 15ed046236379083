"""The Frechet distance between two sets of features, and how far to trust it.

    d^2 = |mu_a - mu_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2)          [Dowson & Landau 1982; FID, Heusel 2017]

With S_a = A A^T and S_b = B B^T the last trace is the sum of the singular values of A^T B.  That needs no square root of
a product of matrices, stays real, and is exact when there are fewer pictures than features, so singular covariances.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.evaluation.metrics.intervals import jackknife_error

BLOCKS = 32  # of the jackknife
ROWS = 1_024  # features in float64 at once

Hold = Callable[[tuple[int, ...]], Tensor]  # shape -> room for as many float64


def in_memory(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class FeatureStats:
    """Sums over a set of features: a monoid, so any machine may add any part.  One order of merging gives one result."""

    n: int
    sum: Tensor  # (D,) float64
    outer: Tensor  # (D, D) float64, sum of f f^T

    @classmethod
    def empty(cls, dimensions: int) -> "FeatureStats":
        return cls(0, torch.zeros(dimensions).double(), torch.zeros(dimensions, dimensions).double())

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStats":
        """features: (N, D) of any float type; summed in float64."""
        return cls.of_rows(features, torch.arange(len(features)))

    @classmethod
    def of_rows(cls, features: Tensor, rows: Tensor) -> "FeatureStats":
        """Those of some of the features (N, D), which may be more than a machine should hold at once.  rows: int64."""
        result = cls.empty(features.shape[1])
        for chunk in rows.split(ROWS):
            part = checked(features[chunk])
            result.sum.add_(part.sum(dim=0))
            result.outer.addmm_(part.T, part)
        return cls(len(rows), result.sum, result.outer)

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        if self.sum.shape != other.sum.shape:
            raise ValueError(f"{len(self.sum)} and {len(other.sum)} features a picture: not of the same extractor")
        return FeatureStats(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    def without(self, part: "FeatureStats") -> "FeatureStats":
        """The sums less those of a part of the set."""
        return FeatureStats(self.n - part.n, self.sum - part.sum, self.outer - part.outer)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.n

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D)."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, there are {self.n}")
        return (self.outer - self.n * self.mean.outer(self.mean)) / (self.n - 1)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, root root^T): all that the Frechet distance knows of a distribution."""

    mean: Tensor  # (D,) float64
    root: Tensor  # (D, R) float64, for any R

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """Mean and unbiased covariance of features (N, D); the root is the centred features themselves, if these are few."""
        return cls.of_rows(features, torch.arange(len(features)))

    @classmethod
    def of_rows(cls, features: Tensor, rows: Tensor) -> "Gaussian":
        """Likewise of some of the features.  rows: int64."""
        if len(rows) > features.shape[1]:
            return cls.of_stats(FeatureStats.of_rows(features, rows))
        features = checked(features[rows])
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, there are {len(features)}")
        mean = features.mean(dim=0)
        return cls(mean, (features - mean).T / math.sqrt(len(features) - 1))

    @classmethod
    def of_stats(cls, stats: FeatureStats) -> "Gaussian":
        """The same from sums, by eigenvalues: for more pictures than a machine should hold at once."""
        eigenvalues, vectors = torch.linalg.eigh(stats.covariance)
        kept = eigenvalues > _round_off(eigenvalues)
        return cls(stats.mean, vectors[:, kept] * eigenvalues[kept].sqrt())

    @property
    def trace(self) -> Tensor:
        return self.root.square().sum()


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance, as FID is defined.  Never negative."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} and {len(b.mean)} features a picture: not of the same extractor")
    overlap = _nuclear_norm(a.root.T @ b.root)
    return max(0.0, float((a.mean - b.mean).square().sum() + a.trace + b.trace - 2 * overlap))


@dataclass(frozen=True)
class Distance:
    """A Frechet distance of a sample.  `left_out`: the distance without each block of the jackknife."""

    value: float
    standard_error: float
    left_out: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample beside a reference: the distance of parts of it, and of these without a block, in the memory of some (D, D).

    With C the centred features of n pictures, Tr (S_a S_b)^(1/2) is the sum of the singular values of C root / sqrt(n - 1):
    roots of the eigenvalues of (C root)^T C root, to which each block adds its own, and of C root (C root)^T, which is
    smaller where there are few pictures.
    """

    reference: Gaussian  # whose root is (D, D) at most
    features: Tensor  # of any float type; may lie in a file
    rows: Tensor  # (N,) int64, which of them are the sample's
    blocks: int  # k of them holds every blocks-th picture from the k-th on
    sums: (
        Tensor | None
    )  # (blocks, R, R) float64, of each block (C root)^T C root about the reference's mean; None of N <= R / 2
    moments: "_Moments | None"  # likewise

    def __len__(self) -> int:
        return len(self.rows)

    def left_out(self, *, part: int = 0, parts: int = 1) -> tuple[float, list[float]]:
        """The distance of every parts-th picture from the part-th on, and without each block that lies in them, in order,
        where there are several.  parts divides the number of blocks."""
        own = list(range(part, self.blocks, parts))
        few = 2 * len(range(part, len(self), parts)) <= self.reference.root.shape[1]
        moments, product = self._of_few(part, parts) if few else self._of_sums(own)
        values, rank = [], None
        for without in (None, *own) if len(own) > 1 else (None,):
            rest = moments.over([k for k in own if k != without])
            matrix = product(without, rest)
            rank = _rank(matrix) if rank is None else rank
            values.append(self._distance(rest, torch.linalg.eigvalsh(matrix), rank))
        return values[0], values[1:]

    def _of_few(self, part: int, parts: int) -> "tuple[_Moments, _Product]":
        """By the products of each two pictures of a part."""
        number = torch.arange(part, len(self), parts)
        centred = checked(self.features[self.rows[number]]) - self.reference.mean
        projected = centred @ self.reference.root
        products = projected @ projected.T

        def product(without: int | None, _: _Moments) -> Tensor:
            kept = (number % self.blocks != (-1 if without is None else without)).nonzero().flatten()
            found = products[kept[:, None], kept]
            mean = found.mean(dim=0)
            return found - mean - (mean - mean.mean())[:, None]

        return _Moments.of(centred, number % self.blocks, self.blocks), product

    def _of_sums(self, own: list[int]) -> "tuple[_Moments, _Product]":
        """By the sums of these blocks."""
        total = self.sums[own[0]].clone()
        for k in own[1:]:
            total += self.sums[k]

        def product(without: int | None, rest: _Moments) -> Tensor:
            found = total.clone() if without is None else total - self.sums[without]
            mean = rest.sum[0] @ self.reference.root / rest.n[0]
            return found.addr_(mean, mean, alpha=-float(rest.n[0]))

        return self.moments, product

    def _distance(self, of: "_Moments", eigenvalues: Tensor, rank: int) -> float:
        n, total = int(of.n[0]), of.sum[0]
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, there are {n}")
        trace = (of.squares[0] - total.square().sum() / n) / (n - 1)
        overlap = eigenvalues[-min(rank, n - 1) :].clamp(min=0).sqrt().sum() / math.sqrt(n - 1)
        return max(0.0, float((total / n).square().sum() + trace + self.reference.trace - 2 * overlap))


def _rank(matrix: Tensor) -> int:
    """Of a matrix C^T C, at least 1.  An eigenvalue of it that is 0 comes out as the round-off of the largest, whose root is
    not small; one that is that small by the unlike sizes of C's columns is not 0, so these are made equal first."""
    sizes = matrix.diagonal().clamp(min=0).sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)
    eigenvalues = torch.linalg.eigvalsh(matrix / sizes / sizes[:, None])
    return max(1, int((eigenvalues > _round_off(eigenvalues)).sum()))


class _Moments(NamedTuple):
    """Of blocks of pictures, features less the reference's mean."""

    n: Tensor  # (blocks,) int64
    sum: Tensor  # (blocks, D) float64
    squares: Tensor  # (blocks,) float64, sums of |f|^2

    @classmethod
    def of(cls, centred: Tensor, block: Tensor, blocks: int) -> "_Moments":
        """centred (N, D) float64; block (N,): of each picture."""
        squares = torch.zeros(blocks).double().index_add_(0, block, centred.square().sum(dim=1))
        sums = torch.zeros(blocks, centred.shape[1]).double().index_add_(0, block, centred)
        return cls(block.bincount(minlength=blocks), sums, squares)

    def over(self, blocks: list[int]) -> "_Moments":
        """Of some of the blocks as one."""
        return _Moments(*(values[blocks].sum(dim=0, keepdim=True) for values in self))


_Product = Callable[[int | None, _Moments], Tensor]  # without a block, and the moments of the rest -> centred


def beside(
    reference: Gaussian,
    features: Tensor,
    rows: Tensor | None = None,
    *,
    blocks: int = BLOCKS,
    hold: Hold = in_memory,
) -> Sample:
    """A sample's features (N, D) beside a reference.  rows: which of them, int64; None for all.  hold: gives the room for
    a (D, D) of each block, where there are more pictures than features."""
    if features.shape[1:] != reference.mean.shape:
        raise ValueError(f"{features.shape[1]} and {len(reference.mean)} features a picture: not of the same extractor")
    rows = torch.arange(len(features)) if rows is None else rows
    blocks = max(1, min(blocks, len(rows) // 2))
    root = reference.root
    if root.shape[0] < root.shape[1]:  # a square one has the same covariance
        root = torch.linalg.qr(root.T, mode="r").R.T
    reference = Gaussian(reference.mean, root)
    if 2 * len(rows) <= root.shape[1]:
        return Sample(reference, features, rows, blocks, None, None)
    sums, parts = hold((blocks, root.shape[1], root.shape[1])), []
    for k in range(blocks):
        own, total = rows[k::blocks], torch.zeros(root.shape[1], root.shape[1]).double()
        moments = _Moments(*(torch.zeros(shape).double() for shape in ((1,), (1, len(root)), (1,))))
        for chunk in own.split(ROWS):
            centred = checked(features[chunk]) - reference.mean
            found = _Moments.of(centred, torch.zeros(len(chunk), dtype=torch.int64), 1)
            moments = _Moments(*(a + b for a, b in zip(moments, found, strict=True)))
            projected = centred @ root
            total.addmm_(projected.T, projected)
        sums[k] = total
        parts.append(moments)
    return Sample(
        reference, features, rows, blocks, sums, _Moments(*(torch.cat(each) for each in zip(*parts, strict=True)))
    )


def frechet_to(reference: Gaussian, features: Tensor, *, blocks: int = BLOCKS) -> Distance:
    """The distance of a sample's features (N, D) from a fixed reference, and its standard error over such samples."""
    return jackknifed(beside(reference, features, blocks=blocks))


def jackknifed(sample: Sample) -> Distance:
    """Delete-a-block jackknife: without every blocks-th picture in turn; where pictures are sorted by class, each block has
    the classes in proportion.  Not a bootstrap: a resample has only 63 % distinct pictures, hence a covariance of lower
    rank, and lies further from the reference by much more than the spread in question.  The jackknife errs to the safe
    side [Efron & Stein 1981]: hardly where there are more pictures than features, by up to sqrt 2 where there are fewer;
    `extrapolate` takes part of that off.
    """
    if sample.blocks < 2:
        raise ValueError(f"{len(sample)} pictures are too few for a standard error: draw at least 4")
    value, left_out = sample.left_out()
    return Distance(value, jackknife_error(left_out), tuple(left_out))


def _round_off(eigenvalues: Tensor) -> Tensor:
    """What an eigenvalue of a singular covariance may be instead of 0, whose root would not be small.  Ascending."""
    return eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps


def _nuclear_norm(matrix: Tensor) -> Tensor:
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[0] > 1.5 * matrix.shape[1]:  # the triangular factor has the same singular values and is smaller
        matrix = torch.linalg.qr(matrix, mode="r").R
    return torch.linalg.svdvals(matrix).sum()


def checked(features: Tensor) -> Tensor:
    """Features (N, D) of any float type in float64.  Raises ValueError where they are not all finite."""
    if features.ndim != 2:
        raise ValueError(f"features are (N, D), not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("the features are not all finite, so no distance between them exists")
    return features.double()
