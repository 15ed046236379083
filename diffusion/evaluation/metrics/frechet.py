"""The Frechet distance between two sets of features, and how far to trust it.

    d^2 = |mu_a - mu_b|^2 + Tr S_a + Tr S_b - 2 Tr (S_a S_b)^(1/2)          [Dowson & Landau 1982; FID, Heusel 2017]

With S_a = A A^T and S_b = B B^T the last trace is the sum of the singular values of A^T B.  That needs no square root of
a product of matrices, stays real, and is exact when there are fewer pictures than features, so singular covariances.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 256  # features in float64 at once


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
        return torch.addr(self.outer, self.mean, self.mean, alpha=-self.n).div_(self.n - 1)


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
            stats = FeatureStats.of_rows(features, rows)
            mean, covariance = stats.mean, stats.covariance
            del stats  # as large as the covariance
            return cls(mean, _root(covariance))
        features = checked(features[rows])
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, there are {len(features)}")
        mean = features.mean(dim=0)
        return cls(mean, (features - mean).T / math.sqrt(len(features) - 1))

    @classmethod
    def of_stats(cls, stats: FeatureStats) -> "Gaussian":
        """The same from sums, by eigenvalues: for more pictures than a machine should hold at once."""
        return cls(stats.mean, _root(stats.covariance))

    @property
    def trace(self) -> Tensor:
        return self.root.square().sum()


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance, as FID is defined.  Never negative."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} and {len(b.mean)} features a picture: not of the same extractor")
    overlap = _nuclear_norm(a.root.T @ b.root)
    return max(0.0, float((a.mean - b.mean).square().sum() + a.trace + b.trace - 2 * overlap))


def round_off(eigenvalues: Tensor) -> Tensor:
    """What an eigenvalue of a singular covariance may be instead of 0, whose root would not be small.  Ascending."""
    return eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps


def _root(covariance: Tensor) -> Tensor:
    """(D, rank), in the memory of the eigenvectors."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    least = int((eigenvalues <= round_off(eigenvalues)).sum())
    return vectors[:, least:].mul_(eigenvalues[least:].sqrt())


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
    found = features.double()
    if not found.sum().isfinite():  # a quarter of the time that asking each number takes
        raise ValueError("the features are not all finite, so no distance between them exists")
    return found
