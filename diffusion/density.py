"""The noise levels that training draws: densities of sigma, by inversion of uniform numbers, and their stratification."""

from collections.abc import Callable
from functools import lru_cache, partial

from torch import Tensor

from diffusion import schedule
from diffusion.distill import student_levels
from diffusion.random import Stream, uniform
from diffusion.recipe import TrainRecipe

Density = Callable[[Tensor], Tensor]  # u in (0, 1), any shape -> sigma, increasing in u


def log_uniform_sigma(u: Tensor, *, low: float, high: float) -> Tensor:
    """ln sigma uniform between ln low and ln high.  u in (0, 1), any shape."""
    return (low * (high / low) ** u.double()).to(u.dtype)


def one_of(u: Tensor, *, levels: Tensor) -> Tensor:
    """One of the levels (n,), increasing, each as likely as any other.  u in (0, 1), any shape."""
    return levels.to(u.device)[(u * len(levels)).long().clamp_(max=len(levels) - 1)]


def stratified(seed: int, index: Tensor, batch_size: int, stream: Stream = Stream.SIGMA) -> Tensor:
    """u_i = (stratum_i + u) / B: every global batch of B positions has one u in each of B equal parts of (0, 1).

    index: (b,) int64 positions in the global order, any part of any batch.  Returns (b,) float64, each a function of its
    position alone.  A batch's strata are dealt out from a random first one on, so that over the batches a place in the
    batch - it may belong to one stream of the data - sees all of them.
    """
    first = index - index % batch_size
    # the second word of the first position, which no picture's own u uses
    turn = (uniform(seed, stream, first, (2,))[:, 1].double() * batch_size).long()
    stratum = (index + turn) % batch_size
    # float64: in float32 the last stratum of a large batch would round up to 1
    return (stratum + uniform(seed, stream, index).double()) / batch_size


@lru_cache(maxsize=4)  # every step asks, and a chain's table takes as long as the rest of drawing
def density_of(recipe: TrainRecipe) -> Density:
    """The density of a recipe; a student's is on the levels at which it will be asked."""
    if recipe.lesson:
        return partial(one_of, levels=student_levels(recipe.lesson)[:-1].flip(0))
    if recipe.noise == "log_uniform":
        return partial(log_uniform_sigma, low=recipe.noise_min, high=recipe.noise_max)
    if recipe.noise == "uniform_t":
        return partial(schedule.uniform_t_sigma, betas=schedule.BETAS[recipe.chain](recipe.chain_steps))
    return partial(schedule.log_normal_sigma, mean=recipe.noise_mean, std=recipe.noise_std)
