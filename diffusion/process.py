"""The textbook Markov chain, exact and small: forward, posterior, reverse, and the variational bound as an evaluation.

Here alone the variance-preserving z_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) n is at home, the x_t of the
source text: z_t = x / sqrt(1 + sigma_t^2) of x = x0 + sigma_t n everywhere else.  t is (B,) int64 in 1 .. T; z, x0 and
noise are (B, *shape).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.sampler import Denoise
from diffusion.schedule import SIGMA_CEILING, alpha_bar_of_sigma, check_betas, check_t, sigmas_of_betas

_HALF_STEP = 1 / 255  # half the distance between neighbours of the 256 values in [-1, 1]


@dataclass(frozen=True)
class Chain:
    """A chain's coefficients, each (T,) float64 with [t - 1] for t, in the letters of DDPM."""

    betas: Tensor  # of `schedule`

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", check_betas(self.betas))

    @cached_property
    def sigmas(self) -> Tensor:
        return sigmas_of_betas(self.betas)

    @cached_property
    def signal(self) -> Tensor:
        """sqrt(alpha_bar_t)"""
        return alpha_bar_of_sigma(self.sigmas).sqrt()

    @cached_property
    def spread(self) -> Tensor:
        """sqrt(1 - alpha_bar_t), without the digits that the subtraction loses"""
        return alpha_bar_of_sigma(1 / self.sigmas).sqrt()

    @cached_property
    def posterior_of_x0(self) -> Tensor:
        """sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)"""
        return _before(self.signal, 1) * self.betas / self.spread**2

    @cached_property
    def posterior_of_z(self) -> Tensor:
        """sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)"""
        return (1 - self.betas).sqrt() * (_before(self.spread, 0) / self.spread) ** 2

    @cached_property
    def posterior_variances(self) -> Tensor:
        """beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t): 0 at t = 1"""
        return self.betas * (_before(self.spread, 0) / self.spread) ** 2


# --- forward


def forward_step(z: Tensor, t: Tensor, noise: Tensor, chain: Chain) -> Tensor:
    """z_t given z_{t-1} = z: sqrt(1 - beta_t) z + sqrt(beta_t) noise.  [DDPM, Eq. 2]"""
    return _at((1 - chain.betas).sqrt(), t, z) * z + _at(chain.betas.sqrt(), t, z) * noise


def diffuse(x0: Tensor, t: Tensor, noise: Tensor, chain: Chain) -> Tensor:
    """z_t given x0: sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise, all t steps at once.  [DDPM, Eq. 4]"""
    return _at(chain.signal, t, x0) * x0 + _at(chain.spread, t, x0) * noise


# --- posterior and reverse


def posterior_mean(z: Tensor, x0: Tensor, t: Tensor, chain: Chain) -> Tensor:
    """The mean of q(z_{t-1} given z_t = z, x0) = N(mean, chain.posterior_variances I).  [DDPM, Eq. 6 and 7]

    With D for x0 it is the reverse chain's mean in the x0 form.  At t = 1 it is x0; where beta_T = 1, z counts for
    nothing.
    """
    return _at(chain.posterior_of_x0, t, z) * x0 + _at(chain.posterior_of_z, t, z) * z


def reverse_mean(z: Tensor, epsilon: Tensor, t: Tensor, chain: Chain, x0_mean: Tensor | float = 0.0) -> Tensor:
    """The reverse chain's mean in the epsilon form: (z - beta_t / sqrt(1 - alpha_bar_t) epsilon) / sqrt(1 - beta_t).

    Equal to `posterior_mean` with x0 = (z - sqrt(1 - alpha_bar) epsilon) / sqrt(alpha_bar).  [DDPM, Eq. 11]
    Where beta_T = 1 that is 0 / 0: z_T is noise alone, epsilon says nothing of x0, and the best that is known of it is
    `x0_mean`, the mean of the data (0 is the middle grey).  There the answer is sqrt(alpha_bar_{T-1}) x0_mean.
    """
    ends = chain.betas == 1
    gain = torch.where(ends, 0, (1 - chain.betas).rsqrt())
    fallback = torch.where(ends, chain.posterior_of_x0, 0)
    share = chain.betas / chain.spread
    return _at(gain, t, z) * (z - _at(share, t, z) * epsilon) + _at(fallback, t, z) * x0_mean


def reverse_step(mean: Tensor, t: Tensor, noise: Tensor, variances: Tensor) -> Tensor:
    """z_{t-1} = mean + sqrt(variance_t) noise; at t = 1 the mean itself.  [DDPM, Alg. 2]

    The usual variances, (T,), are `chain.betas`, right for x0 ~ N(0, 1), and `chain.posterior_variances`, right for a
    single x0: the two ends between which the best lies.  [DDPM, Sec. 3.2]
    """
    deviations = torch.cat([variances.new_zeros(1), variances[1:].sqrt()])
    return mean + _at(deviations, t, mean) * noise


# --- losses over the chain's steps.  A condition is bound beforehand: partial(denoise, label=label).


def l_weighted(denoise: Denoise, x0: Tensor, t: Tensor, noise: Tensor, chain: Chain, weights: Tensor) -> Tensor:
    """w(t) mean ||noise - epsilon(z_t, t)||^2 of each picture, weights (T,).  Returns (B,).

    epsilon = (x - D) / sigma, so that it is w(t) / sigma_t^2 times the error of D: 0 where sigma_T = inf.
    """
    error = (_denoised(denoise, x0, t, noise, chain) - x0).square().flatten(1).mean(dim=1)
    return _at(weights / chain.sigmas**2, t, error) * error


def l_simple(denoise: Denoise, x0: Tensor, t: Tensor, noise: Tensor, chain: Chain) -> Tensor:
    """`l_weighted` with w(t) = 1; its t is `schedule.uniform_t`.  Returns (B,).  [DDPM, Eq. 14]"""
    return l_weighted(denoise, x0, t, noise, chain, torch.ones_like(chain.betas))


# --- the variational bound, in nats per picture but for `variational_bound` itself


def gaussian_kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """KL(N(mean, variance I) || N(other_mean, other_variance I)), means (B, *shape), variances (B,).  Returns (B,)."""
    n = math.prod(mean.shape[1:])
    distance = (mean - other_mean).double().square().flatten(1).sum(dim=1)
    ratio = variance.double() / other_variance.double()
    return (n * (ratio - 1 - ratio.log()) + distance / other_variance.double()) / 2


def prior_kl(x0: Tensor, chain: Chain) -> Tensor:
    """L_T = KL(q(z_T given x0) || N(0, I)): what of x0 is left at the end; 0 if beta_T = 1.  (B,)  [DDPM, Eq. 5]"""
    ones = torch.ones(len(x0), dtype=torch.float64, device=x0.device)
    mean, variance = chain.signal[-1].item() * x0, chain.spread[-1].item() ** 2 * ones
    return gaussian_kl(mean, variance, torch.zeros_like(x0), ones)


def transition_kl(denoise: Denoise, x0: Tensor, t: Tensor, noise: Tensor, chain: Chain, variances: Tensor) -> Tensor:
    """L_{t-1} = KL(q(z_{t-1} given z_t, x0) || p(z_{t-1} given z_t)), t >= 2, at one draw of z_t.  (B,)  [DDPM, Eq. 8]

    With the posterior's variances it is (1 / sigma_{t-1}^2 - 1 / sigma_t^2) / 2 ||x0 - D||^2.  [VDM, Sec. 4]
    """
    if int(t.min()) < 2:
        raise ValueError(
            "the step from z_1 to x0 is the decoder's and no Gaussian: take t >= 2, and `decoder_nll` there"
        )
    # both means have the same share of z_t: it cancels
    scale = _at(chain.posterior_of_x0, t, x0)
    exact, chosen = (table.to(x0.device)[t - 1] for table in (chain.posterior_variances, variances))
    return gaussian_kl(scale * x0, exact, scale * _denoised(denoise, x0, t, noise, chain), chosen)


def decoder_nll(mean: Tensor, x0: Tensor, variance: float) -> Tensor:
    """L_0 = -ln P(x0), P the mass of N(mean, variance) in each value's bin, over the picture.  (B,)  [DDPM, Eq. 13]

    x0 has the 256 values of a uint8 picture in [-1, 1]; the bins of -1 and 1 reach to infinity.
    """
    values, deviation = x0.double(), math.sqrt(variance)
    steps = (values + 1) / (2 * _HALF_STEP)
    if not ((steps - steps.round()).abs() < 0.01).all() or values.abs().max() > 1 + _HALF_STEP:
        raise ValueError(
            "x0 is not a uint8 picture in [-1, 1], so bits per value have no meaning: round it to 256 values"
        )
    lower = torch.where(values < -1 + _HALF_STEP, -math.inf, (values - _HALF_STEP - mean) / deviation)
    upper = torch.where(values > 1 - _HALF_STEP, math.inf, (values + _HALF_STEP - mean) / deviation)
    # mirrored into the left tail, where ln Phi keeps its digits
    lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    log_mass = log_upper + torch.log(-torch.expm1(torch.special.log_ndtr(lower) - log_upper))
    return -log_mass.flatten(1).sum(dim=1)


class Bound(NamedTuple):
    """-log2 P(x0) is at most `total`, in bits per value of the picture."""

    prior: Tensor  # (B,), L_T
    transitions: Tensor  # (B, T - 1), L_{t-1} for t = 2 .. T; of an estimate (B, K), each times (T - 1) / K
    decoder: Tensor  # (B,), L_0

    @property
    def total(self) -> Tensor:
        return self.prior + self.transitions.sum(dim=1) + self.decoder


def variational_bound(
    denoise: Denoise, x0: Tensor, noise: Callable[[Tensor], Tensor], chain: Chain, variances: Tensor
) -> Bound:
    """L_T + sum_t L_{t-1} + L_0 in bits per value, at one draw of z_t for each t, from noise(t): T evaluations.

    x0 is a uint8 picture in [-1, 1].  variances (T,) are those of the reverse chain, the first the decoder's:
    `chain.betas` or `decodable(chain.posterior_variances)`.  It is the mean over the noise that is a bound.  [DDPM, Eq. 5]
    """
    every = torch.arange(2, len(chain.betas) + 1, device=x0.device).expand(len(x0), -1)
    return estimated_bound(denoise, x0, every, noise, chain, variances)


@torch.no_grad()
def estimated_bound(
    denoise: Denoise, x0: Tensor, t: Tensor, noise: Callable[[Tensor], Tensor], chain: Chain, variances: Tensor
) -> Bound:
    """`variational_bound` from K of the T - 1 transitions of each picture, t (B, K): K + 1 evaluations.

    Where each t is uniform over 2 .. T, together in whatever way, the mean over the draws is the full sum: an unbiased
    estimate.  noise: steps (B,) -> (B, *shape).
    """
    if not (variances > 0).all():
        raise ValueError("a variance is 0: pass `decodable(variances)`, which gives the decoder of z_1 a width")
    nats = [transition_kl(denoise, x0, now, noise(now), chain, variances) for now in t.unbind(dim=1)]
    first = torch.ones(len(x0), dtype=torch.int64, device=x0.device)
    decoder = decoder_nll(_denoised(denoise, x0, first, noise(first), chain), x0, variances[0].item())
    share = (len(chain.betas) - 1) / max(1, len(nats))
    transitions = torch.stack(nats, dim=1) * share if nats else decoder.new_zeros(len(x0), 0)
    bits = 1 / (math.prod(x0.shape[1:]) * math.log(2))
    return Bound(prior_kl(x0, chain) * bits, transitions * bits, decoder * bits)


def decodable(variances: Tensor) -> Tensor:
    """The posterior's variances with the first, which is 0, replaced by the second.  [Nichol & Dhariwal 2021]"""
    return torch.cat([variances[1:2], variances[1:]])


def _before(table: Tensor, first: float) -> Tensor:
    """The table of t - 1 beside that of t, `first` at t = 1."""
    return torch.cat([table.new_tensor([first]), table[:-1]])


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t - 1] of a table (T,), in the type of `like` (B, *shape) and as a column beside it."""
    return table.to(like)[check_t(t, len(table)) - 1].view(-1, *(1,) * (like.dim() - 1))


def _denoised(denoise: Denoise, x0: Tensor, t: Tensor, noise: Tensor, chain: Chain) -> Tensor:
    """D for z_t, asked as x = sqrt(1 + sigma^2) z_t at sigma = sigma_t, at most SIGMA_CEILING.

    Above the ceiling x is not quite x0 + sigma n, but a function of z_t alone, so that the bound stays a bound.
    """
    sigmas = chain.sigmas.clamp(max=SIGMA_CEILING)
    x = diffuse(x0, t, noise, chain) * _at((1 + sigmas**2).sqrt(), t, x0)
    return denoise(x, _at(sigmas, t, x0).flatten())
