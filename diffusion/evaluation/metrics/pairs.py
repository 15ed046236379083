"""All pairs of the pictures of two sets, a tile at a time and in float64: the memory is a tile's, however many there are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.evaluation.metrics.frechet import checked

TILE = 512  # pictures of either set


@dataclass(frozen=True, eq=False)
class Picked:
    """Some rows of features (N, D), taken when they are asked for: where these lie in a file, they stay there."""

    features: Tensor
    places: Tensor  # int64 (n,)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.places), *self.features.shape[1:]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, some: slice | Tensor) -> Tensor:
        return self.features[self.places[some]]


Features = Tensor | Picked


def chunks(features: Features, prepare: Callable[[Tensor], Tensor] = checked) -> Iterator[tuple[slice, Tensor]]:
    """Rows (N, ...), a chunk at a time: which, and what `prepare` makes of them, float64."""
    for start in range(0, len(features), TILE):
        rows = slice(start, min(start + TILE, len(features)))
        yield rows, prepare(features[rows])


def tiles(
    a: Features, b: Features, prepare: Callable[[Tensor], Tensor] = checked
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """All pairs of rows of a (N, D) and b (M, D): which rows of each, and these as `prepare` makes them, float64."""
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} features a picture: not of the same extractor")
    for rows, own in chunks(a, prepare):
        for columns, other in chunks(b, prepare):
            yield rows, columns, own, other


def tiles_within(
    a: Features, prepare: Callable[[Tensor], Tensor] = checked
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Likewise all pairs of rows of one set, each in one of its two orders only, but for those of a chunk with itself."""
    for rows, own in chunks(a, prepare):
        for start in range(0, rows.start, TILE):
            columns = slice(start, start + TILE)
            yield rows, columns, own, prepare(a[columns])
        yield rows, rows, own, own


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of a (N, D) and b (M, D) float64, (N, M); exactly 0 where there is nothing but round-off."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} features a picture: not of the same extractor")
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    apart = (a @ b.T).mul_(-2).add_(squares)
    return apart.masked_fill_(apart <= squares.mul_(1e-13), 0.0)


def nearest_rows(
    a: Features, b: Features | None, k: int, *, prepare: Callable[[Tensor], Tensor] = checked
) -> tuple[Tensor, Tensor]:
    """Squared distances of each row of a (N, D) to the k nearest of b (M, D), M at least k, ascending, and which these are,
    each (N, k).  b: None for the other rows of a."""
    best = torch.full((len(a), k), torch.inf).double()
    index = torch.zeros(len(a), k, dtype=torch.int64)

    def meet(rows: slice, columns: slice, apart: Tensor) -> None:
        number = torch.arange(columns.start, columns.stop).expand(len(apart), -1)
        known, names = torch.cat([best[rows], apart], dim=1), torch.cat([index[rows], number], dim=1)
        best[rows], order = known.topk(k, dim=1, largest=False)
        index[rows] = names.gather(1, order)

    for rows, columns, own, other in tiles_within(a, prepare) if b is None else tiles(a, b, prepare):
        apart = squared_distances(own, other)
        if b is None and rows == columns:
            apart.fill_diagonal_(torch.inf)
        meet(rows, columns, apart)
        if b is None and rows != columns:
            meet(columns, rows, apart.T)
    return best, index
