"""Whether drawn pictures look like real ones, and whether they show all that these show, by nearest neighbours.

A set's manifold is the union of the balls around its pictures, each as wide as the way to its k-th nearest other.

    precision   share of drawn pictures in the manifold of the real ones            [Kynkaanniemi 2019, Eq. 1-3], k = 3
    recall      share of real pictures in the manifold of the drawn ones
    density     how many of the real balls a drawn picture lies in, over k          [Naeem 2020, Eq. 4], k = 5
    coverage    share of real balls that hold a drawn picture                       [Naeem 2020, Eq. 5]

All pairs count, in float64.  The real pictures are taken as given; the errors are over samples of the
same size.  Coverage and recall depend on that size, and the error of each needs a way of its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.evaluation.metrics.intervals import half_width, t_quantile
from diffusion.evaluation.metrics.pairs import Features, nearest_rows, squared_distances, tiles
from diffusion.random import Stream, bits

K_PRECISION = 3
K_DENSITY = 5
SPLITS = 32  # into halves, for the error of recall: a power of 2
_PAIRS = 32_768  # of pictures at once
_NEAR = 64  # neighbours among which the k-th of the same half is looked for


@dataclass(frozen=True)
class Estimate:
    """A measured number with its standard error over samples of that size."""

    value: float
    standard_error: float
    degrees: int  # of freedom, of Student's t
    pictures: int  # drawn

    def share_interval(self, confidence: float) -> tuple[float, float]:
        """Of a share: Wilson's, for as many independent pictures as would have this error; so it stays within 0 and 1 and
        has a width where the share is 0 or 1.  [Wilson 1927]"""
        p, z2 = self.value, t_quantile((1 + confidence) / 2, self.degrees) ** 2
        n = p * (1 - p) / self.standard_error**2 if self.standard_error and 0 < p < 1 else self.pictures
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n**2))) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def mean_interval(self, confidence: float) -> tuple[float, float]:
        """Of a mean that is not below 0."""
        half = half_width(self.standard_error, self.degrees, confidence)
        return max(0.0, self.value - half), self.value + half


@dataclass(frozen=True)
class Neighbourhood:
    """The four numbers of one sample."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


@dataclass(frozen=True, eq=False)
class Real:
    """Real pictures and their balls."""

    features: Features  # (M, D)
    near: Tensor  # (M,) squared radii of precision
    wide: Tensor  # (M,) of density and coverage

    @classmethod
    def of(cls, features: Features) -> "Real":
        """features: (M, D) of any float type, of more than 5 pictures."""
        reach = _neighbours(features, max(K_PRECISION, K_DENSITY))[0]
        return cls(features, reach[:, K_PRECISION - 1], reach[:, K_DENSITY - 1])


def neighbourhood(drawn: Features, real: Real) -> Neighbourhood:
    """The four numbers of drawn pictures, features (N, D), N at least 8."""
    n, m = len(drawn), len(real.features)
    if n < 8:
        raise ValueError(f"{n} pictures are too few for the recall of halves: draw at least 8")
    reach, nearest = _neighbours(drawn, min(n - 1, _NEAR))
    first = halves(n)  # (SPLITS, N)
    own = _radii_in_halves(reach, nearest, first)
    found, balls = torch.zeros(n, dtype=torch.bool), torch.zeros(n).double()
    recalled = torch.zeros(m, dtype=torch.bool)
    by_half = torch.zeros(2, SPLITS, m, dtype=torch.bool)
    count, mark = torch.zeros(m, dtype=torch.int64), torch.zeros(m, dtype=torch.int64)
    names = _names(n)
    for rows, columns, a, b in tiles(drawn, real.features):
        apart = squared_distances(a, b)
        found[rows] |= (apart <= real.near[columns]).any(dim=1)
        inside = apart <= real.wide[columns]
        balls[rows] += inside.sum(dim=1).double()
        count[columns] += inside.sum(dim=0)
        mark[columns] += (inside * names[rows, None]).sum(dim=0)  # wraps: any two sets of pictures have two sums
        recalled[columns] |= (apart <= reach[rows, K_PRECISION - 1, None]).any(dim=0)
        _recall_of_halves(apart, own[:, rows], first[:, rows], by_half[:, :, columns])
    shares = by_half.double().mean(dim=2)
    return Neighbourhood(
        precision=_share_of(found),
        recall=Estimate(
            float(recalled.double().mean()),
            math.sqrt(float((shares[0] - shares[1]).square().mean()) / 4),
            min(SPLITS, n // 2),
            n,
        ),
        density=Estimate(float(balls.mean()) / K_DENSITY, float(balls.std()) / K_DENSITY / math.sqrt(n), n - 1, n),
        coverage=Estimate(float((count > 0).double().mean()), _coverage_error(count, mark, n), n - 1, n),
    )


def halves(n: int) -> Tensor:
    """Which of n pictures are in the first half of each split, (SPLITS, N) bool: one of each two neighbours, so that where
    pictures are sorted by class both halves have the classes in proportion.

    Which one goes by the rows of a Hadamard matrix: balanced half-samples.  [McCarthy 1969]
    """
    sign = torch.zeros(1, 1, dtype=torch.int64)
    while len(sign) < SPLITS:
        sign = torch.cat([torch.cat([sign, sign], dim=1), torch.cat([sign, 1 - sign], dim=1)])
    picture = torch.arange(n)
    return (sign[:, picture // 2 % SPLITS] + picture) % 2 == 0


def _recall_of_halves(apart: Tensor, own: Tensor, first: Tensor, found: Tensor) -> None:
    """Note in `found` (2, SPLITS, M) which real pictures lie in a ball of either half of each split.

    apart (N, M): squared distances; own (SPLITS, N): squared radii; first (SPLITS, N): whether in the first half.  Few real
    pictures are near to a drawn one: those alone are looked at, and of them those that are not in all halves yet.
    """
    near = (apart <= own.max(dim=0).values[:, None]) & ~found.all(dim=1).all(dim=0)
    for pairs in near.nonzero().split(_PAIRS):
        drawn, real = pairs.unbind(dim=1)
        split, pair = (apart[drawn, real] <= own[:, drawn]).nonzero().unbind(dim=1)
        half = (~first[split, drawn[pair]]).long()
        found[half, split, real[pair]] = True


def _neighbours(features: Features, k: int) -> tuple[Tensor, Tensor]:
    """Squared distances to the k nearest others, ascending, and which these are, each (N, k)."""
    n = len(features)
    if n <= k:
        raise ValueError(f"{n} pictures are too few for the {k} nearest others of each: at least {k + 1} are needed")
    return nearest_rows(features, None, k)


def _radii_in_halves(reach: Tensor, nearest: Tensor, first: Tensor) -> Tensor:
    """Squared distance of each picture to the third nearest of its own half, (SPLITS, N); the farthest known where its
    neighbours (N, k) show fewer, which has a probability of 2^-50."""
    radii = []
    for half in first:
        together = half[nearest] == half[:, None]
        place = (together.cumsum(dim=1) < K_PRECISION).sum(dim=1).clamp(max=reach.shape[1] - 1)
        radii.append(reach.gather(1, place[:, None])[:, 0])
    return torch.stack(radii)


def _share_of(found: Tensor) -> Estimate:
    n, share = len(found), float(found.double().mean())
    return Estimate(share, math.sqrt(share * (1 - share) / n), n - 1, n)


def _coverage_error(count: Tensor, mark: Tensor, n: int) -> float:
    """The standard error of the coverage of M balls.  count (M,): drawn pictures in each; mark (M,): which ones.

    Two balls i, j are both empty with a probability of P_i P_j e^(mean of the number in both) where pictures come one by
    one, so their covariance is the sum over m of (-1)^(m + 1) P(one and the same m pictures are all that lie in i and in
    j): to be counted, without bias.  The term m = 1 alone would be the jackknife's, which is up to twice the truth.  That
    the number of pictures is fixed takes off the square of what one of them adds.
    """
    held = count > 0
    if not held.any():
        return 0.0
    _, group, size = mark[held].unique(return_inverse=True, return_counts=True)
    pictures = torch.zeros_like(size)
    pictures[group] = count[held]
    fixed = float((count == 1).sum()) ** 2 / n
    jackknife = float(size[pictures == 1].square().sum()) - fixed
    variance = float(((pictures % 2 * 2 - 1) * size.square()).sum()) - fixed
    return math.sqrt(max(variance, jackknife / 4, 0.0)) / len(count)


def _names(n: int) -> Tensor:
    """A random word for each of n pictures, (N,) int64: the sum of those of a set is its name."""
    high, low = bits(0, Stream.NAME, torch.arange(n), 2).unbind(dim=1)
    return (high << 32) + low
