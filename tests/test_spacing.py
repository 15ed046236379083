import pytest
import torch

from diffusion.recipe import SamplingRecipe
from diffusion.schedule import (
    BETAS,
    SIGMA_CEILING,
    SPACINGS,
    cosine_betas,
    exponential_sigmas,
    karras_sigmas,
    sigmas_of_betas,
    spaced_sigmas,
)
from diffusion.spacing import sampling_sigmas


def test_each_spacing_is_the_function_of_its_name():
    ends = {"sigma_min": 0.2, "sigma_max": 20.0}
    recipe = SamplingRecipe(**ends, rho=5.0, chain="cosine", chain_steps=50)
    expected = {"karras": karras_sigmas(9, **ends, rho=5.0), "exponential": exponential_sigmas(9, **ends)}
    expected |= {name: spaced_sigmas(cosine_betas(50), spacing(9, 50)) for name, spacing in SPACINGS.items()}
    for name, sigmas in expected.items():
        assert torch.equal(sampling_sigmas(recipe.model_copy(update={"spacing": name}), 9), sigmas)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("chain", BETAS)
def test_a_chain_gives_as_many_levels_as_asked_and_none_above_the_ceiling(chain, spacing):
    recipe = SamplingRecipe(spacing=spacing, chain=chain)
    known = sigmas_of_betas(BETAS[chain](1_000)).clamp(max=SIGMA_CEILING)
    for steps in (2, 24, 95):
        sigmas = sampling_sigmas(recipe, steps)
        assert sigmas.shape == (steps + 1,)
        assert (sigmas.diff() < 0).all()
        assert torch.isin(sigmas[:-1], known).all()
        assert spacing == "leading" or sigmas[0] == known[-1]


def test_more_steps_than_the_chain_has_below_the_ceiling_are_refused():
    recipe = SamplingRecipe(spacing="trailing", chain="source-text")
    with pytest.raises(ValueError, match=r"steps=500: the source-text chain of 1000 steps has 271 .*chain_steps"):
        sampling_sigmas(recipe, 500)
