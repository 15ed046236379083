"""The kernel distance between two sets of features: the squared maximum mean discrepancy, unbiased.  [KID, Binkowski 2018]

    MMD^2 = mean k(x, x') - 2 mean k(x, y) + mean k(y, y'),    k(x, y) = (x . y / D + 1)^3          [Gretton 2012, Eq. 3]

over all pairs of different pictures: not over random subsets, whose choice would add noise of its own.  Being unbiased it
may lie below 0.  What merges are sums over pairs of parts: the kernel's features number D^3 / 6, so no sum over pictures
alone could hold them.
"""

import math

import torch
from torch import Tensor

from diffusion.evaluation.pairs import Features, chunks, tiles
from diffusion.evaluation.stats import BLOCKS, Distance


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
    for rows, columns, a, b in tiles(features, features):
        if rows.start >= columns.start:  # the others are the same pairs
            sums.append(float(kernel(a, b).sum()) * (1 if rows == columns else 2))
    sums += [-float(_own(rows).sum()) for _, rows in chunks(features)]
    return math.fsum(sums) / (n * (n - 1))


def kernel_distance(features: Features, reference: Features, *, within: float, blocks: int = BLOCKS) -> Distance:
    """MMD^2 of a sample's features (N, D) from the reference's (M, D), which are taken as given, and its standard error
    over such samples.  within: `mean_within` of the reference.

    Delete-a-block jackknife over the same blocks as the Frechet distance's.  It counts what products of two drawn
    pictures add to the variance twice [Efron & Stein 1981], so that is taken off once.
    """
    n = len(features)
    blocks = min(blocks, n // 2)
    if blocks < 2:
        raise ValueError(f"{n} pictures are too few for a standard error: draw at least 4")
    member = (torch.arange(n)[:, None] % blocks == torch.arange(blocks)).double()  # (N, blocks)
    across = torch.zeros(n).double()
    for rows, _, a, b in tiles(features, reference):
        across[rows] += kernel(a, b).sum(dim=1) / len(reference)
    by_block, row_sums, squares = torch.zeros(n, blocks).double(), torch.zeros(n).double(), 0.0
    for rows, columns, a, b in tiles(features, features):
        block = kernel(a, b)
        if rows == columns:
            block.fill_diagonal_(0.0)
        by_block[rows] += block @ member[columns]
        row_sums[rows] += block.sum(dim=1)
        squares += float(block.square().sum())
    pairs, sums, sizes = member.T @ by_block, member.T @ across, member.sum(dim=0)

    total, kept = pairs.sum(), n - sizes
    value = float(total / (n * (n - 1)) - 2 * across.mean()) + within
    remaining = total - 2 * pairs.sum(dim=1) + pairs.diagonal()
    left_out = remaining / (kept * (kept - 1)) - 2 * (across.sum() - sums) / kept + within
    jackknife = (blocks - 1) / blocks * float((left_out - left_out.mean()).square().sum())
    products = _variance_of_products(row_sums, squares)
    variance = max(jackknife - products, products / 2, 0.0)  # theirs alone is the least it can be, but for noise
    return Distance(value, math.sqrt(variance), tuple(left_out.tolist()))


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
