"""Noise levels: beta schedules of a discrete chain, the levels a sampler visits, the densities training draws from.

A chain of T steps is its `betas`, (T,) float64 with betas[t - 1] = beta_t, t = 1 .. T; diffusers' timestep is t - 1.
It translates into sigma, the noise of the variance-exploding x = x0 + sigma n: alpha_bar = 1 / (1 + sigma^2) and
log-SNR = -2 ln sigma.  Zero terminal SNR is beta_T = 1, alpha_bar_T = 0, sigma_T = inf, log-SNR -inf: no NaN anywhere.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# What stands for sigma = inf where x = x0 + sigma n must be a number: alpha_bar = 2^-24, the choice of diffusers' too.
# Float32 still holds x0 to 2^-12 there, finer than a step of uint8.  `spaced_sigmas` says what it costs.
SIGMA_CEILING = 4096.0


# --- beta schedules


def linear_betas(n: int = 1000, *, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """beta_t from `first` to `last` in equal steps; the defaults are meant for n = 1000.  (n,)  [DDPM, Sec. 4]"""
    return check_schedule(torch.linspace(first, last, n, dtype=torch.float64))


def cosine_betas(n: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """alpha_bar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/n + offset) / (1 + offset)), each beta at most max_beta.  (n,)

    [Nichol & Dhariwal 2021, Eq. 17]
    """
    f = torch.cos(math.pi / 2 * (torch.linspace(0, 1, n + 1, dtype=torch.float64) + offset) / (1 + offset)) ** 2
    return check_schedule((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def source_text_betas(n: int = 1000) -> Tensor:
    """beta_t = 1 - cos^2(pi t / 2n), which ends in beta_n = 1: zero terminal SNR.  (n,)  [the source text]

    Much noisier than `cosine_betas`, where cos^2 is alpha_bar itself and not one step's share: see docs/source-text.md.
    """
    return check_schedule(torch.sin(math.pi / 2 * torch.arange(1, n + 1, dtype=torch.float64) / n) ** 2)


BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "source-text": source_text_betas,
}


def check_betas(betas: Tensor) -> Tensor:
    """The same betas as float64, if they make a chain: (T,), each in (0, 1], and 1 only at T."""
    betas = betas.double()
    if betas.dim() != 1 or not len(betas):
        raise ValueError(f"betas have the shape {tuple(betas.shape)}: give one beta per step, (T,) with T >= 1")
    # written so that NaN fails
    if not (betas > 0).all() or not (betas <= 1).all() or not (betas[:-1] < 1).all():
        raise ValueError(
            f"betas from {betas.min():g} to {betas.max():g}: each is in (0, 1], and only the last may be 1"
        )
    return betas


def check_schedule(betas: Tensor) -> Tensor:
    """The same betas as float64, if they make a chain and never fall, as the source text asks of a schedule."""
    betas = check_betas(betas)
    falls = (betas.diff() < 0).nonzero().flatten() + 2
    if len(falls):
        t = int(falls[0])
        raise ValueError(f"beta_{t} = {betas[t - 1]:g} is below beta_{t - 1} = {betas[t - 2]:g}: betas must not fall")
    return betas


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The chain with sqrt(alpha_bar) shifted to end in 0 and scaled to begin as before.  (T,)  [Lin et al. 2024, Alg. 1]

    sqrt(alpha_bar)' = (sqrt(alpha_bar) - sqrt(alpha_bar_T)) sqrt(alpha_bar_1) / (sqrt(alpha_bar_1) - sqrt(alpha_bar_T))
    """
    betas = check_betas(betas)
    if betas[-1] == 1:
        return betas
    if len(betas) < 2:
        raise ValueError("a chain of one step cannot keep its beginning and change its end: give at least 2 betas")
    root = alpha_bar_of_sigma(sigmas_of_betas(betas)).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return check_betas(betas_of_sigmas(sigma_of_alpha_bar(root**2)))


# --- beta <-> sigma <-> alpha_bar, log-SNR.  Everything float64.


def sigmas_of_betas(betas: Tensor) -> Tensor:
    """sigma_t of every step, increasing, from alpha_bar_t = prod_{s <= t} (1 - beta_s).  (T,)

    sigma^2 = (1 - alpha_bar) / alpha_bar = e^L - 1 with L = -sum ln(1 - beta), so that neither a tiny beta nor an
    alpha_bar that underflows costs digits; what is beyond float64 is inf.
    """
    minus_log = -torch.log1p(-check_betas(betas)).cumsum(0)
    return (minus_log / 2).exp() * (-torch.expm1(-minus_log)).sqrt()


def betas_of_sigmas(sigmas: Tensor) -> Tensor:
    """The chain that visits these levels: beta_t = (sigma_t^2 - sigma_{t-1}^2) / (1 + sigma_t^2), sigma_0 = 0.  (T,)

    sigmas: (T,), increasing, above 0, of which only the last may be inf.  Given some of a chain's levels it is the
    shorter chain with the same marginals [Nichol & Dhariwal 2021, Sec. 4], whose betas may fall.
    """
    sigmas = sigmas.double()
    previous = torch.cat([sigmas.new_zeros(1), sigmas[:-1]])
    if not (sigmas > previous).all():
        raise ValueError("the noise levels of a chain start above 0 and increase: sort them, drop 0 and doubles")
    now = torch.hypot(torch.ones_like(sigmas), 1 / sigmas).reciprocal()  # sigma_t / sqrt(1 + sigma_t^2), 1 at inf
    before = previous / torch.hypot(torch.ones_like(sigmas), sigmas)
    return (now - before) * (now + before)


def alpha_bar_of_sigma(sigma: Tensor) -> Tensor:
    """alpha_bar = 1 / (1 + sigma^2), any shape; 1 - alpha_bar without cancellation is alpha_bar_of_sigma(1 / sigma)."""
    return 1 / (1 + sigma.double() ** 2)


def sigma_of_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """sigma = sqrt((1 - alpha_bar) / alpha_bar), any shape; inf at 0."""
    alpha_bar = alpha_bar.double()
    if not ((alpha_bar >= 0) & (alpha_bar <= 1)).all():
        raise ValueError(f"alpha_bar from {alpha_bar.min():g} to {alpha_bar.max():g}: it is a share, from 0 to 1")
    return (1 - alpha_bar).sqrt() / alpha_bar.sqrt()


def log_snr_of_sigma(sigma: Tensor) -> Tensor:
    """ln(alpha_bar / (1 - alpha_bar)) = -2 ln sigma, any shape; -inf at inf, inf at 0."""
    return -2 * sigma.double().log()


def sigma_of_log_snr(log_snr: Tensor) -> Tensor:
    """sigma = exp(-log_snr / 2), any shape."""
    return (-log_snr.double() / 2).exp()


# --- levels for samplers: (n + 1,) float64, decreasing to 0


def karras_sigmas(n: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0.  Returns (n + 1,) float64.  [EDM, Eq. 5]"""
    if n < 2:
        raise ValueError(f"n={n}: need at least 2 levels, one at sigma_max and one at sigma_min")
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def exponential_sigmas(n: int, *, sigma_min: float, sigma_max: float) -> Tensor:
    """n levels in equal ratios, which is in equal steps of log-SNR, then 0.  Returns (n + 1,).  [DPM-Solver]"""
    if n < 2:
        raise ValueError(f"n={n}: need at least 2 levels, one at sigma_max and one at sigma_min")
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=torch.float64).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def spaced_sigmas(betas: Tensor, t: Tensor, *, ceiling: float = SIGMA_CEILING) -> Tensor:
    """The levels of a chain's steps t (n,), decreasing, then 0.  Returns (n + 1,), as a rule.

    A sampler of x = x0 + sigma n cannot start at sigma = inf, nor far above `ceiling` in float32: all levels above it
    become one level at it, so fewer than n + 1 come back if several were.  Starting there from sigma n, without the x0
    that is still in x, costs in total variation at most E||x0|| / (sigma sqrt(2 pi)), whatever the sampler: 1.1 % for
    64 x 64 RGB pictures of extreme colours at 4096; starting from E[x0] + sigma n, of the order of 1 / sigma^2.
    """
    if len(t) and not (t.diff() < 0).all():
        raise ValueError("the steps of a sampler decrease: give t from noisy to clean, each once")
    levels = sigmas_of_betas(betas)[check_t(t, len(betas)) - 1]
    if (levels > ceiling).any():
        levels = torch.cat([levels.new_tensor([ceiling]), levels[levels < ceiling]])
    return torch.cat([levels, levels.new_zeros(1)])


def trailing_t(n: int, length: int) -> Tensor:
    """n steps t of a chain of this length, decreasing from its last: the spacing that sees the noisiest level.  (n,)

    [Lin et al. 2024, Table 2]; the names of the three spacings are those of its table.
    """
    _check_spacing(n, length)
    # the floats of np.arange decide how halves round; it may give one number too many, just above 0
    return torch.from_numpy(np.arange(length, 0, -length / n)[:n].round().astype(np.int64))


def leading_t(n: int, length: int) -> Tensor:
    """n steps t, decreasing to 1 in whole strides of length // n; the noisiest are left out.  (n,)"""
    _check_spacing(n, length)
    return torch.arange(n - 1, -1, -1) * (length // n) + 1


def linspace_t(n: int, length: int) -> Tensor:
    """n steps t, decreasing from the last to the first, rounded.  (n,)

    diffusers' DPM-Solver++ and UniPC take n + 1 of these, and of the leading ones, without the last.
    """
    _check_spacing(n, length)
    return torch.from_numpy(np.linspace(0, length - 1, n).round()[::-1].astype(np.int64)) + 1


SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "trailing": trailing_t,
    "leading": leading_t,
    "linspace": linspace_t,
}


def _check_spacing(n: int, length: int) -> None:
    if not 1 <= n <= length:
        raise ValueError(f"n={n}: a chain of {length} steps gives a sampler from 1 to {length} of them")


def check_t(t: Tensor, length: int) -> Tensor:
    """The same t, if all are steps of a chain of this length: 1 .. length."""
    if t.numel() and not 1 <= int(t.min()) <= int(t.max()) <= length:
        raise ValueError(f"t from {t.min()} to {t.max()}: this chain has the steps 1 to {length} (diffusers' plus 1)")
    return t


# --- densities for training: u in (0, 1), any shape -> sigma


def log_normal_sigma(u: Tensor, *, mean: float, std: float) -> Tensor:
    """Training noise levels with ln sigma ~ N(mean, std^2), by inversion of u in (0, 1), any shape.  [EDM, Table 1]"""
    return (mean + std * torch.special.ndtri(u.double())).exp().to(u.dtype)


def uniform_t(u: Tensor, length: int) -> Tensor:
    """Steps t uniform over 1 .. length, by inversion of u in (0, 1), any shape, int64."""
    return (u.double() * length).long().clamp(max=length - 1) + 1


def uniform_t_sigma(u: Tensor, *, betas: Tensor, ceiling: float = SIGMA_CEILING) -> Tensor:
    """Training noise levels sigma_t with t uniform over a chain, by inversion of u, any shape; at most `ceiling`."""
    return sigmas_of_betas(betas).clamp(max=ceiling).to(u)[uniform_t(u, len(betas)) - 1]
