"""Samplers as conversations: a sampler asks "what is D(x; sigma)?", whoever drives it answers.  It never calls a network.

All but Heun's take one kind of step, exact for a denoiser that answers T all the way from sigma down to s:

    x_s = T + (s / sigma) (x - T)                                    the deterministic equation
    x_s = T + (s / sigma)^2 (x - T) + s sqrt(1 - s^2 / sigma^2) n    the stochastic one of the same marginals

They differ in T: the last answer (DDIM, DDPM), a line through two (DPM-Solver++), a parabola through three (UniPC).
Here x = x0 + sigma n.  A chain's z = x / sqrt(1 + sigma^2) takes the same steps in other coordinates, so the samplers that
others write in alpha_bar are written once, here, in sigma.
"""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[..., Tensor]  # (x (B, C, H, W), sigma (B,), **cond) -> E[x0 given x] (B, C, H, W)
Noise = Callable[[int], Tensor]  # number of the step, from 0 -> unit Gaussian of the shape of x


class Query(NamedTuple):
    """What is D(x; sigma) under this condition?  Every value of `cond` is a tensor with B rows."""

    x: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    cond: Mapping[str, Tensor] = {}


Conversation = Generator[Query, Tensor, Tensor]  # yields queries, is sent D(x; sigma), returns x0


def ddim(x: Tensor, sigmas: Tensor, noise: Noise | None = None, *, eta: float = 0.0) -> Conversation:
    """First-order steps: T is the last answer.  sigmas: (n + 1,), decreasing.  [DDIM, Eq. 12 and 16]

    eta = 0 is deterministic, and in these coordinates it is Euler's method on dx/dsigma = (x - D(x; sigma)) / sigma.
    eta = 1 is DDPM's ancestral sampling with the posterior's variance.  [DDPM, Eq. 7 and Alg. 2]
    """
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        denoised = yield _ask(x, sigma)
        kept, added = _shares(sigma, following, eta)
        x = _noised(_mixed(denoised, x, kept), noise, i, added)
    return x


def ddpm_beta(x: Tensor, sigmas: Tensor, noise: Noise) -> Conversation:
    """DDPM's ancestral sampling with the forward step's variance beta instead of the posterior's.  [DDPM, Sec. 3.2]

    Unlike the posterior's it depends on the chain: beta = 1 - alpha_bar(sigma) / alpha_bar(s) of the variance-preserving one
    is (1 + s^2) (sigma^2 - s^2) / (1 + sigma^2) in units of x.  The step to sigma = 0 adds none, as there.
    """
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        denoised = yield _ask(x, sigma)
        if following == 0:
            return denoised
        variance = (1 + following**2) * (sigma**2 - following**2) / (1 + sigma**2)
        x = _noised(_mixed(denoised, x, (following / sigma) ** 2), noise, i, math.sqrt(variance))
    return x


def heun(x: Tensor, sigmas: Tensor) -> Conversation:
    """Second-order steps of two evaluations each, but for the last to sigma = 0.  [EDM, Alg. 1]"""
    for sigma, following in _steps(sigmas):
        x = yield from _heun_step(x, sigma, following)
    return x


def heun_churn(
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    churn: float = 40.0,
    interval: tuple[float, float] = (0.05, 50.0),
    noise_scale: float = 1.003,
) -> Conversation:
    """Heun's steps, each from a level raised by fresh noise where sigma lies in the closed interval.  [EDM, Alg. 2]

    churn, interval and noise_scale are the paper's S_churn, (S_tmin, S_tmax) and S_noise, by default those it found for
    ImageNet [EDM, Table 5].  With noise_scale = 1 the distribution is exact; a little more makes up for networks that
    remove slightly too much noise.
    """
    if churn < 0 or noise_scale < 0:
        raise ValueError(f"churn={churn}, noise_scale={noise_scale}: give 0 or more; `heun` has no churn")
    steps = _steps(sigmas)
    raised = 1 + min(churn / len(steps), math.sqrt(2) - 1)
    for i, (sigma, following) in enumerate(steps):
        if raised > 1 and interval[0] <= sigma <= interval[1]:
            x = _noised(x, noise, i, noise_scale * sigma * math.sqrt(raised**2 - 1))
            sigma *= raised
        x = yield from _heun_step(x, sigma, following)
    return x


def dpmpp_2m(x: Tensor, sigmas: Tensor, noise: Noise | None = None, *, eta: float = 0.0) -> Conversation:
    """Multistep in lambda = -ln sigma: T is on the line through the last two answers.  One evaluation a step.

    eta = 0 solves the deterministic equation, to second order [DPM-Solver++, Alg. 2]; eta = 1 the stochastic one, where
    it is the paper's SDE-DPM-Solver++(2M).
    """
    before = None
    for i, (sigma, following) in enumerate(_steps(sigmas)):
        now = _Answer(-math.log(sigma), (yield _ask(x, sigma)))
        if following == 0:  # infinitely long in lambda: nothing to extrapolate with
            return now.denoised
        kept, added = _shares(sigma, following, eta)
        x = _noised(_mixed(_line(before, now, -math.log(following)), x, kept), noise, i, added)
        before = now
    return x


def unipc(x: Tensor, sigmas: Tensor) -> Conversation:
    """Predictor and corrector, UniPC-2 with B(h) = e^h - 1: third order for one evaluation a step.  [UniPC, Theorem 3.1]

    The predictor is `dpmpp_2m`.  Once the denoiser has answered at its end, the same step is taken again from its start
    with T of the parabola through three answers; the denoiser is not asked again at the corrected place.
    """
    start, older, before = None, None, None  # of the step that led here
    for sigma, following in _steps(sigmas):
        now = _Answer(-math.log(sigma), (yield _ask(x, sigma)))
        if following == 0:
            return now.denoised
        if before is not None:
            x = _mixed(_parabola(older, before, now), start, math.exp(before.log_snr - now.log_snr))
        start, older, before = x, before, now
        x = _mixed(_line(older, now, -math.log(following)), x, following / sigma)
    return x


class _Answer(NamedTuple):
    """What the denoiser said at one level of a multistep sampler."""

    log_snr: float  # lambda = -ln sigma
    denoised: Tensor  # (B, C, H, W)


def _ask(x: Tensor, sigma: float) -> Query:
    return Query(x, x.new_full((len(x),), sigma))


def _steps(sigmas: Tensor) -> list[tuple[float, float]]:
    """Pairs (sigma, following) of levels, as Python numbers: no step waits for a device."""
    levels = sigmas.tolist()
    if len(levels) < 2 or levels[0] == math.inf or not all(a > b >= 0 for a, b in pairwise(levels)):
        raise ValueError(
            f"sigmas={levels}: give at least 2 finite noise levels, each below the one before, the last 0 for a clean x0."
            f" A chain that ends in pure noise starts at sigma = inf: begin at its last finite level"
        )
    return list(pairwise(levels))


def _shares(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """What a step from sigma to s leaves of x - T, and the fresh noise it adds: the module's equations at eta 0 and 1.

    With r = s / sigma the added noise is eta s sqrt(1 - r^2), the old noise left s sqrt(1 - eta^2 (1 - r^2)): together s.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: give 0 (no noise added) to 1 (as much as DDPM adds)")
    ratio = following / sigma
    return ratio * math.sqrt(1 - eta**2 + (eta * ratio) ** 2), eta * following * math.sqrt(1 - ratio**2)


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """a + share (b - a)."""
    # Not lerp: plain operations round once each, wherever a picture lies in its batch; a fused one promises nothing.
    # In place: on a CPU a batch's fresh memory costs more than the arithmetic.
    return (b - a).mul_(share).add_(a)


def _noised(x: Tensor, noise: Noise | None, i: int, std: float) -> Tensor:
    if std == 0:
        return x
    if noise is None:
        raise ValueError("this sampler adds noise in every step: give noise, a function from the step's number to it")
    drawn = noise(i)
    if drawn.shape != x.shape:
        raise ValueError(
            f"noise({i}) has the shape {tuple(drawn.shape)}: give a number for each of x, {tuple(x.shape)}"
        )
    return (drawn.to(x) * std).add_(x)


def _heun_step(x: Tensor, sigma: float, following: float) -> Conversation:
    slope = (x - (yield _ask(x, sigma))) / sigma
    x_euler = x + (following - sigma) * slope
    if following == 0:  # the slope there is 0 / 0: the last step stays Euler
        return x_euler
    slope_next = (x_euler - (yield _ask(x_euler, following))) / following
    return x + (following - sigma) * (slope + slope_next) / 2


def _line(before: _Answer | None, now: _Answer, end: float) -> Tensor:
    """T of a step from `now` to lambda = end: the value halfway of the line through the last two answers."""
    if before is None:
        return now.denoised
    ratio = (end - now.log_snr) / (2 * (now.log_snr - before.log_snr))
    return _mixed(now.denoised, before.denoised, -ratio)


def _parabola(older: _Answer | None, before: _Answer, now: _Answer) -> Tensor:
    """T of the step from `before` to `now`: the mean over the step of the parabola through the three answers.

    With u from 0 to 1 over the step's length h in lambda, the exact solution weighs D(u) by e^(h u); mean_1 and mean_2 are
    the means of u and u^2 under that weight.  Without the older answer: the line's value halfway, as the paper has it.
    """
    if older is None:
        return _mixed(before.denoised, now.denoised, 0.5)
    h = now.log_snr - before.log_snr
    u_older = (older.log_snr - before.log_snr) / h
    mean_1 = -1 / math.expm1(-h) - 1 / h
    mean_2 = -1 / math.expm1(-h) - 2 * mean_1 / h
    share = (mean_1 - mean_2) / (1 - u_older)
    bent = _mixed(before.denoised, older.denoised, share / u_older)
    return (now.denoised - before.denoised).mul_(mean_1 - share).add_(bent)


@dataclass(frozen=True)
class Sampler:
    """A sampler by its name: all are called alike, (x, sigmas, noise), and the deterministic ones leave noise alone."""

    converse: Callable[..., Conversation]
    stochastic: bool = False
    per_step: int = 1  # network evaluations; the last step, to sigma = 0, needs one

    def __call__(self, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Conversation:
        return self.converse(x, sigmas, noise) if self.stochastic else self.converse(x, sigmas)


SAMPLERS = {
    "heun": Sampler(heun, per_step=2),
    "ddim": Sampler(ddim),  # Euler
    "dpmpp_2m": Sampler(dpmpp_2m),
    "unipc": Sampler(unipc),
    "ddpm": Sampler(partial(ddim, eta=1.0), stochastic=True),
    "ddpm_beta": Sampler(ddpm_beta, stochastic=True),
    "dpmpp_2m_sde": Sampler(partial(dpmpp_2m, eta=1.0), stochastic=True),
    "heun_churn": Sampler(heun_churn, stochastic=True, per_step=2),
}


def evaluations(sampler: str, steps: int) -> int:
    """Network evaluations of one unguided trajectory that ends at sigma = 0."""
    return SAMPLERS[sampler].per_step * (steps - 1) + 1


def watched(conversation: Conversation, tell: Callable[[Tensor], None]) -> Conversation:
    """The same conversation; `tell` is told each answer, what x0 looks like from there, before it goes on."""
    query = next(conversation)
    while True:
        answer = yield query
        tell(answer)
        try:
            query = conversation.send(answer)
        except StopIteration as done:
            return done.value


def run(conversation: Conversation, denoise: Denoise) -> Tensor:
    """Hold a conversation to its end with one denoiser.  Returns x0 (B, C, H, W)."""
    with torch.no_grad():
        query = next(conversation)
        while True:
            try:
                query = conversation.send(denoise(query.x, query.sigma, **query.cond))
            except StopIteration as done:
                return done.value
