"""The denoising loss on held-out pictures at each noise level of the recipe."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, linear
from diffusion.evaluation.gathered import Gathered
from diffusion.evaluation.metrics.intervals import digits, half_width
from diffusion.guidance import Cond
from diffusion.loss import denoising_loss, edm_weight
from diffusion.random import Stream, normal
from diffusion.recipe import EvaluateRecipe, Frozen


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    picture: Tensor | None = None,
    *,
    level: int,
    recipe: EvaluateRecipe,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """The loss of each picture at noise level `level` of the recipe, and that of the best linear denoiser, which under EDM
    is a network that answers 0.  Both have EDM's weight, whatever the denoiser predicts and was trained with.

    x0 (N, C, H, W), cond: a row for each.  picture (N,): their numbers; None: 0, 1, ...  The noise is a function of
    recipe.seed, the level and the picture's number.
    """
    sigma, losses, zeros = recipe.loss_levels[level], [], []
    index = (level << 32) + (torch.arange(len(x0)) if picture is None else picture)
    weight = partial(edm_weight, sigma_data=denoiser.sigma_data)
    nothing = partial(linear, sigma_data=denoiser.sigma_data)
    for part in torch.arange(len(x0)).split(recipe.batch_size):
        noise = normal(recipe.seed, Stream.HOLDOUT, index[part], tuple(x0.shape[1:])).to(device)
        operands = (x0[part].to(device), noise, torch.full((len(part),), sigma, device=device))
        rows = {name: value[part].to(device) for name, value in cond.items()}
        losses.append(denoising_loss(denoiser, weight, *operands, rows))
        zeros.append(denoising_loss(nothing, weight, *operands, {}))
    return {"loss": torch.cat(losses).double().cpu().numpy(), "zero": torch.cat(zeros).double().cpu().numpy()}


class HeldOutLoss(Frozen):
    """The weighted denoising loss at one noise level, mean over held-out pictures.  None: not finite."""

    sigma: float
    loss: float | None
    standard_error: float | None  # over pictures
    zero: float | None  # of a network that answers 0, on the same pictures and noise
    pictures: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high) of CONFIDENCE, by Student's t over pictures; None of fewer than 9."""
        if self.loss is None or self.standard_error is None or self.pictures < 9:
            return None
        half = half_width(self.standard_error, self.pictures - 1)
        return digits(max(0.0, self.loss - half)), digits(self.loss + half)


def losses_of(gathered: Gathered) -> tuple[HeldOutLoss, ...]:
    """One for each level of the recipe; none where nothing was held out."""
    levels = gathered.recipe.loss_levels
    return tuple(_level(levels[task.level], result.arrays) for task, result in gathered.of("loss"))


def _level(sigma: float, arrays: dict[str, np.ndarray]) -> HeldOutLoss:
    loss, zero = arrays["loss"], arrays["zero"]
    error = float(loss.std(ddof=1)) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
    return HeldOutLoss(
        sigma=sigma,
        loss=digits(float(loss.mean())),
        standard_error=digits(error),
        zero=digits(float(zero.mean())),
        pictures=len(loss),
    )
