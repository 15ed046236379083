"""The weighted denoising loss, per sample, and the weights w(sigma) of the error of x0.

Errors of other predictions are multiples of the error of x0: with SNR = 1 / sigma^2, |eps error|^2 = SNR |x0 error|^2 and
|v error|^2 = (SNR + 1) |x0 error|^2; in general the network's own error is weighted by w c_out^2.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.denoiser import EDM, c_noise
from diffusion.recipe import TrainRecipe
from diffusion.sampler import Denoise

Weight = Callable[[Tensor], Tensor]  # sigma -> w(sigma), any shape


def denoising_loss(
    denoise: Denoise, weight: Weight, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """w(sigma) mean ||D(x0 + sigma n; sigma) - x0||^2 for each picture.  x0, noise (B, C, H, W); sigma (B,).  Returns (B,).

    [EDM, Eq. 2]
    """
    return weighted_error(denoise, weight, x0 + sigma.view(-1, 1, 1, 1) * noise, x0, sigma, cond)


def weighted_error(
    denoise: Denoise, weight: Weight, x: Tensor, target: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """w(sigma) mean ||D(x; sigma) - target||^2 for each picture.  x, target (B, C, H, W); sigma (B,).  Returns (B,)."""
    return weight(sigma) * (denoise(x, sigma, **cond) - target).square().mean(dim=(1, 2, 3))


def edm_weight(sigma: Tensor, *, sigma_data: float) -> Tensor:
    """w = 1 / c_out^2 of EDM.  [EDM, Eq. 8]

    The best linear denoiser, c_skip x, which is a network F that always answers 0, has an expected loss of about 1 at
    every sigma (exactly 1 when the pixels of x0 have standard deviation sigma_data).
    """
    return 1 / EDM(sigma_data).c_out(sigma) ** 2


def simple_weight(sigma: Tensor) -> Tensor:
    """L_simple, the plain error of epsilon: w = SNR.  [DDPM, Eq. 14]"""
    return 1 / sigma**2


def p2_weight(sigma: Tensor, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """L_simple divided by (k + SNR)^gamma: less for the last, imperceptible noise.  [P2: Choi et al. 2022]

    With k = gamma = 1 it is 1 / (1 + sigma^2).
    """
    return simple_weight(sigma) / (k + simple_weight(sigma)) ** gamma


def min_snr_weight(sigma: Tensor, *, gamma: float = 5.0) -> Tensor:
    """w = min(SNR, gamma), whatever the network predicts.  [Hang et al. 2023, Sec. 3.4]

    The published forms follow from it by c_out^2: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, / 1 for x0.  The
    clamp holds the low noise levels down, where SNR is large; a maximum would do the opposite.
    """
    return simple_weight(sigma).clamp(max=gamma)


def weight_of(recipe: TrainRecipe) -> Weight:
    """The fixed weight of a recipe.  What is learned with `uncertainty` comes on top of EDM's."""
    weights: dict[str, Weight] = {
        "edm": partial(edm_weight, sigma_data=recipe.sigma_data),
        "simple": simple_weight,
        "p2": partial(p2_weight, gamma=recipe.p2_gamma),
        "min_snr": partial(min_snr_weight, gamma=recipe.min_snr_gamma),
        "uncertainty": partial(edm_weight, sigma_data=recipe.sigma_data),
    }
    return weights[recipe.weight]


class Uncertainty(nn.Module):
    """u(sigma), the logarithm of the loss to be expected at a noise level: one linear layer over Fourier features.

    Learned beside the network and of no use after it.  It starts at 0, where `uncertain` changes no gradient of the
    network.  [EDM2, Eq. 21; Kendall et al. 2018]
    """

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        # c_noise spans about 3 from the lowest to the highest level; periods from 8 down to 1/2: u has no finer detail
        frequencies = 2 * math.pi * 2 ** torch.linspace(-3, 1, features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.out = nn.Linear(features, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """sigma (B,).  Returns u (B,)."""
        angle = c_noise(sigma)[:, None] * self.frequencies
        return self.out(torch.cat([angle.cos(), angle.sin()], dim=1)).squeeze(1)


def uncertain(losses: Tensor, u: Tensor) -> Tensor:
    """loss / e^u + u, least at u = ln E[loss]: every noise level then pulls with the same force.  [EDM2, Eq. 21]"""
    return losses * (-u).exp() + u
