"""What the limit of the Frechet distance asks of a sample beside its reference: eigenvalues, and pictures along them.

T_N = R^T S_N R, with the sample's covariance S_N and the reference's R R^T, is the matrix whose root the distance has.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.evaluation.metrics.frechet import ROWS, checked, round_off
from diffusion.evaluation.metrics.sample import Blocks, Rest, Sample


class Spectrum(NamedTuple):
    """Of n pictures."""

    n: int
    distance: float  # from the reference, at n
    apart: float  # their mean squared distance from the reference's mean
    eigenvalues: Tensor  # of T_N, (E,) ascending, without those that are 0 but for rounding: n - 1 at most
    shares: Tensor  # (at most n, E): of the unit vector that is one of the pictures, the squared components along them


def spectra(sample: Sample, groups: Iterable[Blocks] = ()) -> Iterator[Spectrum]:
    """Of the sample, and then without each group of its blocks.

    Of many pictures the shares of ROWS at most: an odd number apart, so that all blocks have some.
    """
    number = torch.arange(len(sample))[:: -(-len(sample) // ROWS) | 1]
    projected = None
    for rest in sample.rests(groups):
        n = rest.moments.n
        mean = rest.moments.sum @ sample.reference.root / n
        found, vectors = torch.linalg.eigh(rest.matrix)
        kept = _kept(rest, found, n * mean.square().sum())
        eigenvalues, vectors = found[kept], vectors[:, kept]
        if rest.few:
            shares = vectors.square()
        else:
            if projected is None:
                centred = checked(sample.features[sample.rows[number]]) - sample.reference.mean
                projected = centred @ sample.reference.root
            some = ~torch.isin(number % sample.blocks, torch.tensor(rest.left, dtype=torch.int64))
            shares = ((projected[some] - mean) @ vectors).square_().div_(eigenvalues)
        distance = sample.distance(
            rest, torch.linalg.eigvalsh(rest.matrix)
        )  # keeps digits of small ones that eigh loses
        yield Spectrum(n, distance, float(rest.moments.squares / n), eigenvalues / (n - 1), shares)


def _kept(rest: Rest, eigenvalues: Tensor, shift: Tensor) -> Tensor:
    """Which are not 0 but for rounding, bool.  shift: what taking off the mean has taken off the matrix."""
    kept = eigenvalues > round_off(torch.cat([eigenvalues, eigenvalues[-1:].maximum(shift)]))
    kept[: -min(rest.rank, rest.moments.n - 1)] = False
    return kept
