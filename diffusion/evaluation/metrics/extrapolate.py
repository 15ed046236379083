"""The Frechet distance of infinitely many samples, from the spectrum of N.

    d^2 = E|x - mu_r|^2 + Tr S_r - 2 Tr T^(1/2),    T = R^T S R,  S_r = R R^T

The first two terms have no bias.  The third is too small by what N samples cannot tell of T.  With
D(k) = Tr T (T + k)^-1 it is

    Tr T^(1/2) = 1/pi  integral of k^(-1/2) D(k) dk  from 0 to infinity,

and the sample has D at every k that it can tell: its own Tr T_N (T_N + t)^-1 is D at k(t) > t.  [Marchenko & Pastur 1967;
for Frechet distances Tiomoko & Couillet 2019]  k / t is what a picture left out of the sample finds there, by what it finds
in it: with its leverage h, the mean of h / (1 - h) by that of h.  That asks nothing of the features' distribution but that
a quadratic form of one picture is near its trace, up to a factor of the picture's own.  So there is no fit, and no series in
1/N, which with fewer samples than features does not converge.

With at most as many samples as features k ends at k(0) > 0.  Below, D is taken to go on as the reference's would, whose
spectrum is known, scaled to meet D(k(0)).  Scaled to meet the slope there as well, by a power of its eigenvalues, it gives
another value: the difference is stated as a doubt.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.evaluation.metrics.jackknife import BLOCKS, PAIRS, error_by_pairs
from diffusion.evaluation.metrics.sample import Distance, Sample
from diffusion.evaluation.metrics.spectrum import Spectrum, spectra

LEAST = 2 * BLOCKS  # samples
_STEP = 0.1  # of log t
_BEYOND = math.log(1e4)  # of the eigenvalues, on both sides
_NEAR = 1.1  # times k(0), to where the slope is taken
_POWERS = (0.01, 8.0)
_WIDE, _CLOSE = 200.0, 1e-9  # of a logarithm, or a power, that is sought


@dataclass(frozen=True)
class Extrapolated:
    """The limit, and what its error leaves out."""

    value: float  # may be below 0 by its error
    standard_error: float
    doubt: float  # what the spectrum that N samples cannot tell may change


class Curve(NamedTuple):
    """D(k) of the population, as far as a sample tells it."""

    k: Tensor  # (T,) ascending
    count: Tensor  # (T,) D there


def extrapolate(sample: Sample) -> tuple[Distance, Extrapolated]:
    """The distance at N and its limit, of LEAST pictures or more in BLOCKS blocks.

    Both errors are of `error_by_pairs`.  Products of two samples are most of the distance's variance where there are fewer
    pictures than features, and of the limit's, which is a square, where both sets are alike.
    """
    n = len(sample)
    if n < LEAST or sample.blocks != BLOCKS:
        raise ValueError(f"{n} pictures are too few to extrapolate from: draw at least {LEAST}")
    reference = _Reference.of(sample)
    found = spectra(sample, [*((block,) for block in range(BLOCKS)), *PAIRS])
    whole = next(found)
    doubt, first = reference.doubt(whole), reference.both(whole)
    del whole
    distances, limits = zip(first, *map(reference.both, found), strict=True)  # one spectrum in the memory at a time
    distance = Distance(distances[0], error_by_pairs(distances), distances[1 : 1 + BLOCKS])
    return distance, Extrapolated(limits[0], error_by_pairs(limits), doubt)


class _Reference(NamedTuple):
    """What is known of the reference alone."""

    logs: Tensor  # of the eigenvalues that T has where the model's covariance is the reference's
    trace: float  # of its covariance

    @classmethod
    def of(cls, sample: Sample) -> "_Reference":
        singular = torch.linalg.svdvals(sample.reference.root)
        kept = singular[singular > singular[0] * len(singular) * torch.finfo(torch.float64).eps]
        return cls(4 * kept.log(), float(sample.reference.trace))

    def both(self, spectrum: Spectrum) -> tuple[float, float]:
        """The distance and its limit."""
        return spectrum.distance, self.limit(spectrum)

    def limit(self, spectrum: Spectrum) -> float:
        value = spectrum.apart + self.trace
        if not len(spectrum.eigenvalues):  # nothing in which the pictures differ is in the reference
            return value
        curve = _curve(spectrum)
        return value - 2 * (_told(curve) + self._untold(curve))

    def doubt(self, spectrum: Spectrum) -> float:
        """What another power of the reference's spectrum would change."""
        if not len(spectrum.eigenvalues):
            return 0.0
        curve = _curve(spectrum)
        return 2 * abs(self._untold(curve) - self._untold(curve, self._power(curve)))

    def _untold(self, curve: Curve, power: float = 1.0) -> float:
        """1/pi integral of k^(-1/2) D(k) dk from 0 to k(0), of this spectrum to a power, scaled to meet D there."""
        k, count = float(curve.k[0]), float(curve.count[0])
        if self._all_told(curve):  # D is constant below
            return 2 * math.sqrt(k) * count / math.pi
        over = (power * self.logs + self._scale(curve, power)).exp() / k
        return float((2 * (over * k).sqrt() * over.rsqrt().atan()).sum()) / math.pi

    def _scale(self, curve: Curve, power: float) -> float:
        """Its logarithm, by Newton's method within what is known of it."""
        offset, count = power * self.logs - curve.k[0].log(), float(curve.count[0])
        low, high, found = -_WIDE, _WIDE, 0.0
        while high - low > _CLOSE:
            share = (offset + found).sigmoid()
            over = float(share.sum()) - count
            low, high = (low, found) if over > 0 else (found, high)
            step = over / max(float((share * (1 - share)).sum()), 1e-300)
            if abs(step) < _CLOSE:
                break
            found = found - step if low < found - step < high else (low + high) / 2
        return found

    def _power(self, curve: Curve) -> float:
        """With which it meets the slope of log D at log k(0), too."""
        if self._all_told(curve):
            return 1.0
        near = int((curve.k > _NEAR * curve.k[0]).nonzero()[0])
        slope = float((curve.count[0] / curve.count[near]).log() / (curve.k[near] / curve.k[0]).log())

        low, high = _POWERS
        while high - low > _CLOSE:
            power = (low + high) / 2
            share = (power * self.logs + self._scale(curve, power) - curve.k[0].log()).sigmoid()
            steeper = float((share * (1 - share)).sum() / share.sum()) > slope
            low, high = (power, high) if steeper else (low, power)
        return (low + high) / 2

    def _all_told(self, curve: Curve) -> bool:
        return float(curve.count[0]) >= len(self.logs) - 0.5


def _curve(spectrum: Spectrum) -> Curve:
    """q is what the others find of a picture, on average: k / t = (n - 1) q / D.

    A picture is left out of n, not of n + 1, so q is too large: to first order in 1/n by (1 + q) (dk/dt - 1) / n.  There
    dk/dt is that of pictures without factors of their own, k = t (n - 1) / (n - 1 - D).
    """
    n, degrees, x = spectrum.n, spectrum.n - 1, spectrum.eigenvalues
    low, high = float(x[0].log()) - _BEYOND, float(x[-1].log()) + _BEYOND
    t = torch.linspace(low, high, 2 + int((high - low) / _STEP), dtype=torch.float64).exp()[:, None]
    inside, outside = x / (x + t), t / (x + t)
    count, left = (
        inside.sum(dim=1),
        degrees - len(x) + outside.sum(dim=1),
    )  # left: degrees - count, without cancellation
    h = inside @ spectrum.shares.T
    others = (1 - 1 / n - spectrum.shares.sum(dim=1)).clamp(min=0)  # of a picture, where the sample has nothing else
    q = (h / (outside @ spectrum.shares.T + others)).mean(dim=1) / h.mean(dim=1) * count / n
    rise = degrees / left * (1 - (inside * outside).sum(dim=1) / left)
    q = q - (1 + q) * (rise - 1).clamp(min=0) / degrees
    return Curve(t[:, 0] * q * degrees / count, count)


def _told(curve: Curve) -> float:
    """1/pi integral of k^(-1/2) D(k) dk from k(0) to infinity."""
    values = curve.k.sqrt() * curve.count
    return float(torch.trapezoid(values, curve.k.log()) + 2 * values[-1]) / math.pi  # beyond, D falls as 1 / k
