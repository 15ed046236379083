"""What the limit of the Frechet distance asks of a sample beside its reference: eigenvalues, and pictures along them.

T_N = R^T S_N R, with the sample's covariance S_N and the reference's R R^T, is the matrix whose root the distance has.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.evaluation.metrics.frechet import ROWS, checked, round_off
from diffusion.evaluation.metrics.sample import Rest, Sample


class Spectrum(NamedTuple):
    """Of n pictures."""

    n: int
    apart: float  # their mean squared distance from the reference's mean
    eigenvalues: Tensor  # of T_N, (E,) ascending, without those that are 0 but for rounding: n - 1 at most
    shares: Tensor  # (at most n, E): of the unit vector that is one of the pictures, the squared components along them


def spectra(sample: Sample, *, part: int = 0, parts: int = 1) -> Iterator[Spectrum]:
    """Of every parts-th picture from the part-th on, and then without each block that lies in them, in order.

    Of many pictures the shares of ROWS at most: an odd number apart, so that all blocks have some.
    """
    number = torch.arange(part, len(sample), parts)
    number = number[:: -(-len(number) // ROWS) | 1]
    projected = None
    for rest in sample.rests(part=part, parts=parts):
        n = rest.moments.n
        mean = rest.moments.sum @ sample.reference.root / n
        eigenvalues, vectors = _eigen(rest, n * mean.square().sum())
        if rest.few:
            shares = vectors.square()
        else:
            if projected is None:
                centred = checked(sample.features[sample.rows[number]]) - sample.reference.mean
                projected = centred @ sample.reference.root
            kept = projected if rest.left is None else projected[number % sample.blocks != rest.left]
            shares = ((kept - mean) @ vectors).square_().div_(eigenvalues)
        yield Spectrum(n, float(rest.moments.squares / n), eigenvalues / (n - 1), shares)


def _eigen(rest: Rest, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and their vectors in columns, without those that are 0 but for rounding.  shift: what taking
    off the mean has taken off the matrix."""
    eigenvalues, vectors = torch.linalg.eigh(rest.matrix)
    kept = eigenvalues > round_off(torch.cat([eigenvalues, eigenvalues[-1:].maximum(shift)]))
    kept[: -min(rest.rank, rest.moments.n - 1)] = False
    return eigenvalues[kept], vectors[:, kept]
