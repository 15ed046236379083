"""The noise levels that a sampler visits, as a recipe says."""

from torch import Tensor

from diffusion.recipe import SamplingRecipe
from diffusion.schedule import (
    BETAS,
    SIGMA_CEILING,
    SPACINGS,
    exponential_sigmas,
    karras_sigmas,
    sigmas_of_betas,
    spaced_sigmas,
)

DETAIL = 0.02  # last level above 0: at 0.1, where the demo's generation ends, a picture is blurred (34.6 dB, here 42.9)


def sampling_sigmas(recipe: SamplingRecipe, steps: int) -> Tensor:
    """The levels of this many steps, decreasing, then 0.  Returns (steps + 1,) float64.

    The steps of a chain that lie above SIGMA_CEILING count as one, at the ceiling: spaced among the others, none is lost.
    Raises ValueError for more steps than a chain has.
    """
    if recipe.spacing == "karras":
        return karras_sigmas(steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max, rho=recipe.rho)
    if recipe.spacing == "exponential":
        return exponential_sigmas(steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    betas = BETAS[recipe.chain](recipe.chain_steps)
    below = int((sigmas_of_betas(betas) < SIGMA_CEILING).sum())
    betas = betas[: below + 1]
    if steps > len(betas):
        raise ValueError(
            f"steps={steps}: the {recipe.chain} chain of {recipe.chain_steps} steps has {len(betas)} to choose from; take"
            f" fewer, or a longer chain in the model's recipe, evaluate.sampling.chain_steps"
        )
    return spaced_sigmas(betas, SPACINGS[recipe.spacing](steps, len(betas)))


def detailed_sigmas(recipe: SamplingRecipe, steps: int) -> Tensor:
    """Those of `sampling_sigmas`, but down to where the detail of a picture lies: to change and restore given ones."""
    return sampling_sigmas(recipe.model_copy(update={"sigma_min": min(recipe.sigma_min, DETAIL)}), steps)
