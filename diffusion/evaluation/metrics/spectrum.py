"""What the limit of the Frechet distance asks of a sample beside its reference: eigenvalues, and pictures along them.

T_N = R^T S_N R, with the sample's covariance S_N and the reference's R R^T, is the matrix whose root the distance has.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.evaluation.metrics.frechet import checked, round_off
from diffusion.evaluation.metrics.sample import Blocks, Rest, Sample

SHARES = 1_024  # pictures


class Spectrum(NamedTuple):
    """Of n pictures."""

    n: int
    distance: float  # from the reference, at n
    apart: float  # their mean squared distance from the reference's mean
    eigenvalues: Tensor  # of T_N, (E,) ascending, without those that are 0 but for rounding: n - 1 at most
    shares: Tensor  # (at most n, E): of the unit vector that is one of the pictures, the squared components along them


def spectra(sample: Sample, groups: Iterable[Blocks] = ()) -> Iterator[Spectrum]:
    """Of the sample, and then without each group of its blocks.

    Of many pictures the shares of SHARES at most: an odd number apart, so that all blocks have some.
    """
    number = torch.arange(len(sample))[:: -(-len(sample) // SHARES) | 1]
    shown = None
    if not sample.few:
        shown = checked(sample.features[sample.rows[number]]).sub_(sample.reference.mean) @ sample.reference.root

    def spectrum(rest: Rest) -> Spectrum:
        n = rest.moments.n
        mean = rest.moments.sum @ sample.reference.root / n
        distance = sample.distance(rest)  # by eigvalsh, which keeps digits of small eigenvalues that eigh loses
        eigenvalues, vectors = torch.linalg.eigh(rest.matrix)
        least = _least(rest, eigenvalues, n * mean.square().sum())
        eigenvalues, vectors = eigenvalues[least:], vectors[:, least:]
        if shown is None:
            shares = vectors.square()
        else:
            some = ~torch.isin(number % sample.blocks, torch.tensor(rest.left, dtype=torch.int64))
            shares = (shown[some].sub_(mean) @ vectors).square_().div_(eigenvalues)
        return Spectrum(n, distance, float(rest.moments.squares / n), eigenvalues / (n - 1), shares)

    return map(spectrum, sample.rests(groups))  # which holds none while the next is made


def _least(rest: Rest, eigenvalues: Tensor, shift: Tensor) -> int:
    """How many are 0 but for rounding.  shift: what taking off the mean has taken off the matrix."""
    nothing = round_off(torch.cat([eigenvalues, eigenvalues[-1:].maximum(shift)]))
    return max(int((eigenvalues <= nothing).sum()), len(eigenvalues) - min(rest.rank, rest.moments.n - 1))
