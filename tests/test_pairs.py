"""All pairs in tiles: the same as at once, of rows in memory or picked from elsewhere."""

import pytest
import torch
from torch import Tensor

from diffusion.evaluation.metrics import pairs
from diffusion.evaluation.metrics.pairs import Picked, chunks, nearest_rows, squared_distances, tiles, tiles_within


def normals(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tile", [4, 7, 1_024])
def test_nearest_rows_are_those_of_the_whole_matrix(monkeypatch, tile):
    monkeypatch.setattr(pairs, "TILE", tile)
    a, b = normals(19, 5, 0), normals(23, 5, 1)
    picked = Picked(normals(40, 5, 2), torch.arange(0, 40, 3))
    for rows, columns in ((a, b), (a, a), (a, None), (picked, b), (picked, None)):
        others = columns is None
        one, other = (x[torch.arange(len(x))].double() for x in (rows, rows if others else columns))
        apart = (one[:, None] - other).square().sum(dim=2)
        if others:
            apart.fill_diagonal_(torch.inf)
        expected = apart.sort(dim=1)
        found, index = nearest_rows(rows, columns, 6)
        assert torch.allclose(found, expected.values[:, :6], rtol=1e-10)
        assert torch.equal(index, expected.indices[:, :6])


@pytest.mark.parametrize("tile", [4, 1_024])
def test_tiles_cover_every_pair_once_and_in_float64(monkeypatch, tile):
    monkeypatch.setattr(pairs, "TILE", tile)
    a, b = normals(9, 3, 0), normals(10, 3, 1)
    count, met = torch.zeros(9, 10, dtype=torch.int64), torch.zeros(9, 9, dtype=torch.int64)
    apart = torch.zeros(9, 10).double()
    for rows, columns, own, other in tiles(a, b):
        count[rows, columns] += 1
        apart[rows, columns] = squared_distances(own, other)
    assert (count == 1).all()
    assert torch.allclose(apart, torch.cdist(a.double(), b.double()).square(), rtol=1e-9)
    for rows, columns, own, other in tiles_within(a):
        met[rows, columns] += 1
        assert torch.equal(own, a[rows].double())
        assert torch.equal(other, a[columns].double())
    assert ((met | met.T) == 1).all()
    assert met.sum() == (81 if tile > 9 else 4 * 4 * 3 + 4 * 1 * 2 + 1)  # of each two chunks one tile
    assert torch.equal(torch.cat([rows for _, rows in chunks(a, lambda x: 2 * x)]), 2 * a)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="not of the same extractor"):
        next(tiles(normals(3, 4, 0), normals(3, 5, 1)))
    broken = normals(3, 4, 0)
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not all finite"):
        nearest_rows(broken, normals(3, 4, 1), 1)
