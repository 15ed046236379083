"""The variational bound on held-out pictures, in bits per value: its chain, its steps, its measurement.

-log2 P(x0 given class) of the model as a chain of T ancestral steps, unguided: not of the sampler that draws its pictures.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, linear
from diffusion.density import stratified
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.metrics.intervals import CONFIDENCE, digits, half_width
from diffusion.guidance import Cond
from diffusion.process import Bound, Chain, estimated_bound
from diffusion.random import Stream, normal
from diffusion.recipe import EvaluateRecipe, Frozen
from diffusion.sampler import Denoise
from diffusion.schedule import betas_of_sigmas, exponential_sigmas, uniform_t

PARTS = 8  # of the profile


def chain_of(recipe: EvaluateRecipe) -> Chain:
    """`bound_steps` levels in equal steps of log-SNR: uniform t then finds each octave of noise as often."""
    levels = exponential_sigmas(recipe.bound_steps, sigma_min=recipe.bound_sigma_min, sigma_max=recipe.bound_sigma_max)
    return Chain(betas_of_sigmas(levels[:-1].flip(0)))


def variances_of(chain: Chain) -> Tensor:
    """The posterior's, with which the bound is least as T grows, but beta_1 for the decoder: a network that knows nothing
    of such little noise is off by sigma_1."""
    return torch.cat([chain.betas[:1], chain.posterior_variances[1:]])


def steps_of(recipe: EvaluateRecipe, picture: Tensor, pictures: int) -> Tensor:
    """The steps at which pictures (B,) of so many are asked, (B, bound_draws), each uniform over 2 .. T.

    All of a picture's are evenly spread over the chain, and so are those of all pictures together, but for a random turn.
    """
    draws = recipe.bound_draws
    index = torch.arange(draws) * pictures + picture[:, None]
    u = stratified(recipe.seed, index.flatten(), draws * pictures, Stream.BOUND).view(index.shape)
    return 1 + uniform_t(u, recipe.bound_steps - 1)


def held_out_bound(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    picture: Tensor,
    *,
    pictures: int,
    recipe: EvaluateRecipe,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """An estimate of the bound of each picture (B,), number `picture` of so many, and that of the best linear denoiser.

    cond: a row for each.  Returns {"t"} (B, K), {"prior", "transitions", "decoder"} as `Bound`'s, {"zero"} the linear
    one's total.  Steps and noise are functions of recipe.seed and the picture's number.
    """
    chain, t = chain_of(recipe), steps_of(recipe, picture, pictures).to(device)
    x0 = x0.to(device)

    def noise(now: Tensor) -> Tensor:
        return normal(recipe.seed, Stream.BOUND, (now.cpu() << 32) + picture, tuple(x0.shape[1:])).to(device)

    def estimated(denoise: Denoise) -> Bound:
        return estimated_bound(denoise, x0, t, noise, chain, variances_of(chain))

    found = estimated(partial(denoiser, **{name: value.to(device) for name, value in cond.items()}))
    arrays = found._asdict() | {"t": t, "zero": estimated(partial(linear, sigma_data=denoiser.sigma_data)).total}
    return {name: value.cpu().numpy() for name, value in arrays.items()}


class BoundIdentity(Frozen):
    """What must be equal for two bounds to be compared: everything but the model."""

    metric: Literal["bound/1"] = "bound/1"
    dataset_digest: str
    split: Literal["holdout"] = "holdout"
    pictures: int
    steps: int  # T
    sigma_min: float
    sigma_max: float
    spacing: Literal["equal steps of log-SNR"] = "equal steps of log-SNR"
    variances: Literal["the posterior's, beta_1 for the decoder"] = "the posterior's, beta_1 for the decoder"
    draws: int  # steps drawn for each picture
    batch_size: int
    seed: int


class BoundPart(Frozen):
    """What the transitions between two noise levels add to the bound."""

    sigma_from: float
    sigma_to: float
    bits: float | None


class HeldOutBound(Frozen):
    """-log2 P(picture given class) is at most `value`, in bits per value (3 a pixel), in the mean over held-out pictures.

    value = prior + transitions + decoder, estimated without bias.  None: not finite.
    """

    identity: BoundIdentity
    value: float | None
    standard_error: float | None  # over pictures, with what drawing the steps adds
    confidence: float
    low: float | None
    high: float | None
    prior: float | None
    transitions: float | None
    decoder: float | None
    profile: tuple[BoundPart, ...]  # of the transitions
    zero: float | None  # of a network that answers 0, on the same pictures, steps and noise

    @classmethod
    def of(cls, parts: Sequence[dict[str, np.ndarray]], recipe: EvaluateRecipe, dataset_digest: str) -> "HeldOutBound":
        """parts: the results of `held_out_bound` of all pictures, in their order."""
        prior, transitions, decoder, zero, t = (
            np.concatenate([part[name] for part in parts]) for name in ("prior", "transitions", "decoder", "zero", "t")
        )
        n, sums = len(prior), transitions.sum(axis=1)
        total = prior + sums + decoder
        mean = float(total.mean())
        error = float(total.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        half = half_width(error, n - 1)
        identity = BoundIdentity(
            dataset_digest=dataset_digest,
            pictures=n,
            steps=recipe.bound_steps,
            sigma_min=recipe.bound_sigma_min,
            sigma_max=recipe.bound_sigma_max,
            draws=recipe.bound_draws,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        return cls(
            identity=identity,
            value=digits(mean),
            standard_error=digits(error),
            confidence=CONFIDENCE,
            low=digits(mean - half),
            high=digits(mean + half),
            prior=digits(float(prior.mean())),
            transitions=digits(float(sums.mean())),
            decoder=digits(float(decoder.mean())),
            profile=_profile(chain_of(recipe), t, transitions),
            zero=digits(float(zero.mean())),
        )


def bound_of(gathered: Gathered) -> HeldOutBound | None:
    """None where it was not measured."""
    parts = [result.arrays for _, result in gathered.of("bound")]
    return HeldOutBound.of(parts, gathered.recipe, gathered.manifest.digest) if parts else None


def _profile(chain: Chain, t: np.ndarray, transitions: np.ndarray) -> tuple[BoundPart, ...]:
    """The transitions of all pictures, t and transitions (N, K), in equal parts of the chain."""
    sigmas, length = chain.sigmas.tolist(), len(chain.betas)
    parts = min(PARTS, length - 1)
    edges = [1 + (length - 1) * i // parts for i in range(parts + 1)]
    return tuple(
        BoundPart(
            sigma_from=digits(sigmas[low - 1]),
            sigma_to=digits(sigmas[high - 1]),
            bits=digits(float(transitions[(low < t) & (t <= high)].sum()) / len(t)),
        )
        for low, high in pairwise(edges)
    )
