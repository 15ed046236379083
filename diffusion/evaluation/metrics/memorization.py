"""Whether a model repeats its training pictures: drawn pictures against the nearest training picture of each, and how near
held-out pictures, which nobody can have repeated, are to theirs.

A picture is near when its nearest training picture is much nearer than the next ones are: so an average picture, which is
near to all of them, is not.  Two witnesses look: the features, which know a picture that was changed a little as a whole
and need the pixels to bear them out, since poor pictures may share the features of an odd one; and the pixels of a small
copy of it alone, which know one whose details were changed, as by a JPEG, to which features are sensitive.  Each
measures in the held-out pictures' median, and the smaller one counts.  Drawn pictures nearer than nearly all held-out ones
are counted, and what there are more of them than held-out pictures would have given is the share of copies.  So a model
whose pictures are distributed as held-out ones is accused with a known probability, however alike the data's own pictures
are.  [after Meehan et al. 2020; the relative distance after Carlini et al. 2023, Sec. 4.2]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.evaluation.metrics.intervals import CONFIDENCE
from diffusion.evaluation.metrics.pairs import TILE, Features, chunks, nearest_rows
from diffusion.evaluation.metrics.shares import excess, excess_interval

QUANTILE = 0.05  # of the held-out pictures are near: fewer are often duplicates in the data, more hide few copies
SURE = 0.25  # of the threshold: nearer, a picture is a copy however many others are; blurs of plain pictures are not
SIDE = 16  # of the small copies whose pixels are compared: at 32 a JPEG of quality 75 was found half as often
THUMBNAIL = 32  # side of the small copies that people look at
NEIGHBOURS = 50  # to whose mean distance the nearest one's is compared  [Carlini et al. 2023]


@dataclass(frozen=True, eq=False)
class Looks:
    """N pictures as the two witnesses see them."""

    features: Features  # (N, D)
    small: Tensor  # uint8 (N, SIDE, SIDE, 3), of `shrink`


class Neighbour(NamedTuple):
    """The nearest training picture of each of N pictures, as one witness sees it: (N,) each."""

    index: np.ndarray  # int64
    distance: np.ndarray  # float64, Euclidean
    relative: np.ndarray  # float64 in [0, 1]: the same over the mean distance of the NEIGHBOURS nearest


class Nearest(NamedTuple):
    """The same, as both witnesses see it."""

    features: Neighbour
    pixels: Neighbour  # distances in [0, 2], see `standardized`
    apart: np.ndarray  # (N,) float64: distance in pixels of the pair that the features found


@dataclass(frozen=True, eq=False)
class Copies:
    """How many of N drawn pictures are nearer to training pictures than held-out ones are, and the share this speaks of."""

    score: np.ndarray  # (N,) float64, in medians of the held-out pictures' relative distances
    index: np.ndarray  # (N,) int64, the training picture that the witness whose distance counts found
    threshold: float  # a score below this is near
    rank: int  # the threshold is the score of the held-out picture of this rank, 1 the nearest
    near: int  # drawn pictures below it
    counted: int  # of them: no more at one training picture than a model that repeats all of them would bring there
    share: float  # of copies, in excess of what held-out pictures give
    low: float
    high: float
    confidence: float


def shrink(pictures: Tensor, side: int = SIDE) -> Tensor:
    """uint8 (B, H, W, 3) of any shape -> uint8 (B, side, side, 3), area-averaged."""
    x = pictures.permute(0, 3, 1, 2).float()
    small = x if x.shape[2:] == (side, side) else F.interpolate(x, size=(side, side), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def small_copy(pictures: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, SIDE, SIDE, 3), by way of the thumbnail: of a drawn picture no more is kept."""
    return shrink(shrink(pictures, THUMBNAIL))


def standardized(pictures: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3 H W) float64 without mean and of norm 1: the distance of two is sqrt(2 - 2 correlation),
    whatever their brightness and contrast.  About 0 where a picture is of one grey."""
    x = pictures.flatten(1).double()
    x = x - x.mean(dim=1, keepdim=True)
    return x / x.norm(dim=1, keepdim=True).clamp(min=x.shape[1] ** 0.5)  # one level of 256: below it is rounding


def nearest(pictures: Looks, training: Looks) -> Nearest:
    """Of each picture, and in pixels of its mirror image as well, the nearest training picture."""
    parts = (slice(start, start + TILE) for start in range(0, len(pictures.small), TILE))
    found = [_nearest(Looks(pictures.features[rows], pictures.small[rows]), training) for rows in parts]

    def joined(seen: list[Neighbour]) -> Neighbour:
        return Neighbour(*(np.concatenate(each) for each in zip(*seen, strict=True)))

    features, pixels, apart = zip(*found, strict=True)
    return Nearest(joined(features), joined(pixels), np.concatenate(apart))


def _nearest(pictures: Looks, training: Looks) -> Nearest:
    """The same of a tile's pictures at most."""
    mirror = pictures.small.flip(2)
    straight, mirrored = (neighbour(x, training.small, standardized) for x in (pictures.small, mirror))
    nearer = mirrored.distance < straight.distance
    pixels = Neighbour(*(np.where(nearer, b, a) for a, b in zip(straight, mirrored, strict=True)))
    features = neighbour(pictures.features, training.features)
    pair = standardized(training.small[torch.from_numpy(features.index)])
    apart = [(standardized(x) - pair).norm(dim=1) for x in (pictures.small, mirror)]
    return Nearest(features, pixels, torch.minimum(*apart).numpy())


def neighbour(rows: Tensor, among: Tensor, prepare: Callable[[Tensor], Tensor] = Tensor.double) -> Neighbour:
    """The nearest row of among (M, ...), M at least 1, to each of rows (N, ...), as `prepare` makes them, (., D) float64."""
    least, order = nearest_rows(rows, among, min(NEIGHBOURS, len(among)), prepare=prepare)
    index, mean = order[:, 0], least.sqrt().mean(dim=1)
    # again from the difference: of a copy the expanded square is round-off and not 0
    distance = torch.cat([(part - prepare(among[index[own]])).norm(dim=1) for own, part in chunks(rows, prepare)])
    relative = distance / mean.clamp(min=torch.finfo(torch.float64).tiny)
    return Neighbour(index.numpy(), distance.numpy(), relative.numpy())


def copies(drawn: Nearest, held_out: Nearest, *, training: int, confidence: float = CONFIDENCE) -> Copies:
    """The share of the drawn pictures that are copies of training pictures, and its interval.  training: how many of these
    there are.

    Takes drawn and held-out pictures for independent samples.  Of a model whose pictures are distributed as the held-out
    ones low is above 0 with a probability of (1 - confidence) / 2 at most.  Near pictures at one training picture count for
    low as often as all training pictures could be repeated, ceil(N / training) times: a plain one, a square on white, is
    near to every blur that a bad model draws.  Those that are nearer by far all count, however often the one is repeated:
    a model may know a few by heart.  high counts every near one.
    """
    scales = tuple(
        max(float(np.median(distances)), np.finfo(np.float64).tiny)
        for distances in (held_out.features.relative, held_out.apart, held_out.pixels.relative)
    )
    control, _ = _scored(held_out, scales)
    score, index = _scored(drawn, scales)
    rank = rank_of(len(control))
    threshold = float(np.sort(control)[rank - 1])
    near, sure = score < threshold, score < SURE * threshold
    at_each = np.bincount(index[near & ~sure])
    counted = int(sure.sum() + at_each.clip(max=-(-len(score) // training)).sum())
    facts = {"n": len(score), "rank": rank, "control": len(control)}
    low, _ = excess_interval(counted, **facts, confidence=confidence)
    _, high = excess_interval(int(near.sum()), **facts, confidence=confidence)
    return Copies(
        score, index, threshold, rank, int(near.sum()), counted, excess(counted, **facts), low, high, confidence
    )


def rank_of(held_out: int) -> int:
    """Which of so many held-out pictures, 1 the nearest, the threshold is the score of."""
    return max(1, round(QUANTILE * held_out))


def _scored(found: Nearest, scales: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The smaller distance of each picture in these units, and the training picture at it.

    What the features find counts as far as the pixels bear it out: poor pictures of all kinds may have the features of one
    odd training picture.
    """
    features = np.maximum(found.features.relative / scales[0], found.apart / scales[1])
    pixels = found.pixels.relative / scales[2]
    return np.minimum(features, pixels), np.where(features <= pixels, found.features.index, found.pixels.index)
