"""The order in which a published dataset is read: what its manifest says of its shards, put into `data.order`."""

from fractions import Fraction
from itertools import groupby, islice
from math import lcm

from diffusion.data.bucket_order import AnyOrder, Buckets
from diffusion.data.manifest import Manifest, ShardEntry, Split
from diffusion.data.order import Mixture, Order
from diffusion.recipe import TrainRecipe


def order_of(manifest: Manifest, split: Split, recipe: TrainRecipe) -> AnyOrder:
    """The endless sequence of a split's pictures, picture i being the i-th in the order of its shards.

    Blocks have the size of the fullest shard.  A mixture's parts have orders of their own and come in the proportion of
    their weights.  Where pictures have several sizes, so has each size of each part, and they come in whole batches.
    Raises ValueError for a weight that is too small against the others.
    """
    entries = iter(manifest.entries(split))
    if manifest.parts:
        parts = [(part.weight, tuple(islice(entries, getattr(part, split)))) for part in manifest.parts]
    else:
        parts = [(1.0, tuple(entries))]
    read = [(weight, shards) for weight, shards in parts if shards]  # a part may hold nothing out
    if len(manifest.by_size(split)) > 1:
        return _by_size(manifest, read, recipe)
    orders = tuple(_order(shards, recipe) for _, shards in read)
    if not manifest.parts:
        return orders[0]
    return Mixture(orders, tuple(weight for weight, _ in read), recipe.seed)


def _by_size(manifest: Manifest, parts: list[tuple[float, tuple[ShardEntry, ...]]], recipe: TrainRecipe) -> Buckets:
    """Each size of each part has the share of the part's weight that it has of the part's pictures."""
    orders, shares = [], []
    for weight, shards in parts:
        total = sum(entry.pictures for entry in shards)
        for _, own in groupby(shards, manifest.size_of):
            orders.append(_order(tuple(own), recipe))
            shares.append(Fraction(weight) * len(orders[-1]) / total)
    whole = lcm(*(share.denominator for share in shares))
    return Buckets(tuple(orders), tuple(int(share * whole) for share in shares), recipe.batch_size, recipe.seed)


def _order(shards: tuple[ShardEntry, ...], recipe: TrainRecipe) -> Order:
    counts = [entry.pictures for entry in shards]
    return Order(sum(counts), max(counts), seed=recipe.seed, window=recipe.window, streams=recipe.streams)
