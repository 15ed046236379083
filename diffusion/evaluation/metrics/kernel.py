"""The kernel distance between two sets of features: the squared maximum mean discrepancy, unbiased.  [KID, Binkowski 2018]

    MMD^2 = mean k(x, x') - 2 mean k(x, y) + mean k(y, y'),    k(x, y) = (x . y / D + 1)^3          [Gretton 2012, Eq. 3]

over all pairs of different pictures: not over random subsets, whose choice would add noise of its own.  Being unbiased it
may lie below 0.  What merges are sums over pairs of parts: the kernel's features number D^3 / 6, so no sum over pictures
alone could hold them.
"""

import math

import torch
from torch import Tensor

from diffusion.evaluation.metrics.jackknife import BLOCKS
from diffusion.evaluation.metrics.pairs import Features, chunks, tiles, tiles_within
from diffusion.evaluation.metrics.sample import Distance


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """k of each row of a (N, D) with each of b (M, D), (N, M)."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} features a picture: not of the same extractor")
    inner = (a @ b.T).div_(a.shape[1]).add_(1)
    return inner.square().mul_(inner)  # twenty times as fast as a power


def mean_within(features: Features) -> float:
    """The mean of k over all pairs of different pictures of features (N, D): the reference's term, equal for all models."""
    n = len(features)
    if n < 2:
        raise ValueError(f"a kernel distance needs at least 2 pictures, there are {n}")
    sums = []
    for rows, columns, a, b in tiles_within(features):
        sums.append(float(kernel(a, b).sum()) * (1 if rows == columns else 2))
    sums += [-float(_own(rows).sum()) for _, rows in chunks(features)]
    return math.fsum(sums) / (n * (n - 1))


def kernel_distance(
    features: Features, reference: Features, *, within: float, labels: Tensor | None = None, blocks: int = BLOCKS
) -> Distance:
    """MMD^2 of a sample's features (N, D) from the reference's (M, D), which are taken as given, and its standard error
    over such samples.  within: `mean_within` of the reference.  labels (N,) int64: the classes, where the sample has these
    in fixed proportions.  Two of its pictures are then of one class less often than two of the model's, so the mean over
    the pairs of a class is weighted as if a picture came twice; without that the distance would be too small by about
    the classes' own distances over N.

    Delete-a-block jackknife over the same blocks as the Frechet distance's.  It counts what products of two drawn
    pictures add to the variance twice [Efron & Stein 1981], so that is taken off once.
    """
    n = len(features)
    blocks = min(blocks, n // 2)
    if blocks < 2:
        raise ValueError(f"{n} pictures are too few for a standard error: draw at least 4")
    stratum = torch.zeros(n, dtype=torch.int64) if labels is None else _strata(labels)
    member = (torch.arange(n)[:, None] % blocks == torch.arange(blocks)).double()  # (N, blocks)
    across = torch.zeros(n).double()
    for rows, _, a, b in tiles(features, reference):
        across[rows] += kernel(a, b).sum(dim=1) / len(reference)
    by_block, alike, squares = torch.zeros(n, blocks).double(), torch.zeros(n, blocks).double(), 0.0
    for rows, columns, a, b in tiles_within(features):
        block, both = kernel(a, b), rows != columns
        if not both:
            block.fill_diagonal_(0.0)
        squares += float(block.square().sum()) * (2 if both else 1)
        for found in (by_block, alike):
            if found is alike:
                block.mul_(stratum[rows, None] == stratum[columns])
            found[rows] += block @ member[columns]
            if both:
                found[columns] += block.T @ member[rows]
    row_sums = by_block.sum(dim=1)
    sums, sizes = member.T @ across, member.sum(dim=0)

    mean, means = _means_over_pairs(by_block, alike, stratum, member)
    value = float(mean - 2 * across.mean()) + within
    left_out = means - 2 * (across.sum() - sums) / (n - sizes) + within
    jackknife = (blocks - 1) / blocks * float((left_out - left_out.mean()).square().sum())
    products = _variance_of_products(row_sums, squares)
    variance = max(jackknife - products, products / 2, 0.0)  # theirs alone is the least it can be, but for noise
    return Distance(value, math.sqrt(variance), tuple(left_out.tolist()))


def _strata(labels: Tensor) -> Tensor:
    """Number of the stratum of each picture (N,): its class, together with those after it while these have fewer than 4."""
    number, held, numbers = 0, 0, []
    for count in labels.bincount().tolist():
        numbers.append(number)
        held += count
        if held >= 4:
            number, held = number + 1, 0
    return torch.tensor(numbers).clamp(max=max(0, number - 1))[labels]


def _means_over_pairs(by_block: Tensor, alike: Tensor, stratum: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of k over two pictures drawn apart, and the same without each block, (blocks,).

    by_block, alike (N, blocks): sums of k of each picture with the others of each block, all of them and those of its
    stratum.  Pairs of a stratum of m count m / (m - 1) times: for those of a picture with itself, which are not of two.
    """
    n, strata = len(stratum), int(stratum.max()) + 1

    def by_stratum(values: Tensor) -> Tensor:
        return torch.zeros(strata, values.shape[1]).double().index_add_(0, stratum, values)

    sizes, own = by_stratum(member), by_stratum(alike)  # (strata, blocks)
    touched, inside = by_stratum(member * alike.sum(dim=1, keepdim=True)), by_stratum(member * alike)
    total = by_block.sum() + (own.sum(dim=1) / (sizes.sum(dim=1) - 1).clamp(min=1)).sum()
    kept = sizes.sum(dim=1, keepdim=True) - sizes
    pairs = own.sum(dim=1, keepdim=True) - 2 * touched + inside  # of each stratum without each block
    of_all = (
        by_block.sum() - 2 * (member * by_block.sum(dim=1, keepdim=True)).sum(dim=0) + (member * by_block).sum(dim=0)
    )
    without = of_all + (pairs / (kept - 1).clamp(min=1)).sum(dim=0)
    return total / n**2, without / (n - member.sum(dim=0)) ** 2


def _own(features: Tensor) -> Tensor:
    """k of each picture with itself."""
    return (features.square().sum(dim=1) / features.shape[1] + 1) ** 3


def _variance_of_products(row_sums: Tensor, squares: float) -> float:
    """What k, less its mean given either picture, adds to the variance of its mean over all pairs of N, unbiased: 0 of
    fewer than 4.  row_sums (N,): over the other pictures; squares: the sum of k^2 over all ordered pairs.

    2 zeta / (N (N - 1)) with zeta = E k^2 - 2 E k(x, x') k(x, x'') + (E k)^2, each estimated over different pictures only.
    """
    n = len(row_sums)
    if n < 4:
        return 0.0
    total, of_rows = float(row_sums.sum()), float(row_sums.square().sum())
    second = squares / (n * (n - 1))
    shared = (of_rows - squares) / (n * (n - 1) * (n - 2))
    apart = (total**2 - 4 * of_rows + 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3))
    return 2 * (second - 2 * shared + apart) / (n * (n - 1))
