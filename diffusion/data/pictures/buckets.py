"""Aspect buckets: the sizes that the pictures of a dataset have where not all are made square, and whose is which.

A square of a picture twice as wide as high is half of it.  So each picture gets the size, of some that take about as many
pixels as the square, whose shape is nearest to its own, and little is cut off; a batch is of one size.  [NovelAI 2022,
"Improvements on Stable Diffusion"; SDXL, Sec. 2.3]
"""

from functools import lru_cache
from itertools import pairwise

from diffusion.recipe import ShardRecipe

Size = tuple[int, int]  # height, width in pixels


def shown(size: Size) -> str:
    """As people write it, the width first: "80x48"."""
    return f"{size[1]}x{size[0]}"


@lru_cache(maxsize=8)
def buckets_of(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """The sizes from the highest to the widest: all whose sides are multiples of `step` and neither of which could be a
    step longer within resolution^2 pixels, up to this aspect.  The square is one of them, `step` divides its side.

    Of two such sizes the one with more height has less width, so no two have one aspect.
    """
    steps = resolution // step
    heights = range(min(steps**2, int(steps * max_aspect)), 0, -1)
    longest = ((h, steps**2 // h) for h in heights)
    sizes = ((h, w) for h, w in longest if steps**2 // w == h and max(h, w) <= max_aspect * min(h, w))
    return tuple((h * step, w * step) for h, w in sizes)


def buckets_by(recipe: ShardRecipe) -> tuple[Size, ...]:
    """The buckets of a recipe; () where its pictures are square."""
    if recipe.bucket_aspect is None:
        return ()
    return buckets_of(recipe.resolution, recipe.bucket_step, recipe.bucket_aspect)


def size_for(width: int, height: int, recipe: ShardRecipe) -> Size:
    """The size that a picture of width x height pixels gets: the square, or the `nearest` bucket."""
    return nearest(width, height, buckets_by(recipe) or ((recipe.resolution, recipe.resolution),))


def nearest(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """Of sizes from the highest to the widest the one whose log aspect is nearest to that of width x height pixels.

    The middle between two buckets belongs to the one nearer to the square.  In whole numbers, so that it is the same
    everywhere: a picture is beyond the middle of two aspects where the square of its own exceeds their product.
    """
    found = sizes[0]
    for (h1, w1), (h2, w2) in pairwise(sizes):
        mine, middle = width**2 * h1 * h2, height**2 * w1 * w2
        if mine < middle or (mine == middle and h2 < w2):
            break
        found = h2, w2
    return found
