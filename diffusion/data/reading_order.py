"""The order in which a published dataset is read: what its manifest says of its shards, put into `data.order`."""

from itertools import islice

from diffusion.data.manifest import Manifest, Split
from diffusion.data.order import Mixture, Order
from diffusion.recipe import TrainRecipe


def order_of(manifest: Manifest, split: Split, recipe: TrainRecipe) -> Order | Mixture:
    """The endless sequence of a split's pictures, picture i being the i-th in the order of its shards.

    Blocks have the size of the fullest shard.  A mixture's parts have orders of their own and come in the proportion of
    their weights.  Raises ValueError for a weight that is too small against the others.
    """
    counts = manifest.counts(split)
    if not manifest.parts:
        return _order(counts, recipe)
    shards = iter(counts)
    parts = [(part.weight, tuple(islice(shards, getattr(part, split)))) for part in manifest.parts]
    read = [(weight, counts) for weight, counts in parts if counts]  # a part may hold nothing out
    return Mixture(
        tuple(_order(counts, recipe) for _, counts in read), tuple(weight for weight, _ in read), recipe.seed
    )


def _order(counts: tuple[int, ...], recipe: TrainRecipe) -> Order:
    return Order(sum(counts), max(counts), seed=recipe.seed, window=recipe.window, streams=recipe.streams)
