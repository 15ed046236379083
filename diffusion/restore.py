"""Restoration without training for it: a measurement y = A x0 + sigma_y n steers any sampler of a generative model.

DDNM: Wang, Yu & Zhang 2023, "Zero-shot image restoration using denoising diffusion null-space model".
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.operators import LinearOperator
from diffusion.sampler import Conversation, Noise, Query

Solver = Callable[[Tensor, Tensor, Noise], Conversation]  # (x, sigmas, noise): any sampler, from level to level

REPEATS = 3
STRETCH = 4  # steps gone again in time travel: of 1, 4 and 8, 4 gave most for filling in and little less for enlarging
TRAINED_STEPS = 2  # of a model trained to restore, with `null_space` around its own sampler: of 2, 8 and 16, 2 gave the
# best PSNR and SSIM in every task, and features in all but inpainting


def zero_shot(
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    operator: LinearOperator,
    y: Tensor,
    *,
    sigma_y: float = 0.0,
    repeats: int = REPEATS,
) -> Conversation:
    """The way of a model that only draws: DDNM+ in time travel, each stretch of STRETCH steps gone `repeats` times."""

    def solver(x: Tensor, sigmas: Tensor, noise: Noise) -> Conversation:
        return ddnm_plus(x, sigmas, noise, operator, y, sigma_y=sigma_y)

    return time_travel(solver, x, sigmas, noise, length=STRETCH, repeats=repeats)


def null_space(
    conversation: Conversation,
    operator: LinearOperator,
    y: Tensor,
    interval: tuple[float, float] = (0.0, float("inf")),
) -> Conversation:
    """Each answer D becomes A+ y + (I - A+ A) D where sigma lies in the closed interval.  [DDNM]

    So A D = y at every step and, since samplers end in D, of the result: the measurement is satisfied exactly, and the
    model decides what A does not see.  It is not a draw from p(x0 given y): D knows of y only through x (tests/
    test_restore.py has the error in closed form for Gaussians).

    y: A x0 of B pictures or of one for all.  Guidance goes around it, classifier_free(null_space(...), ...), so that
    what is projected is the guided answer.
    """
    known = operator.pinv(y)
    query = next(conversation)
    while True:
        _check(known, query.x)
        answer = yield query
        if interval[0] <= float(query.sigma[0]) <= interval[1]:
            answer = known + (answer - operator.pinv(operator.forward(answer)))
        try:
            query = conversation.send(answer)
        except StopIteration as done:
            return done.value


def ddnm_plus(
    x: Tensor, sigmas: Tensor, noise: Noise, operator: LinearOperator, y: Tensor, *, sigma_y: float
) -> Conversation:
    """The ancestral sampler, the noise of the measurement in the place of as much of its own.  [DDNM, Eq. 17-19]

    In our coordinates the step from sigma to s weighs x with a fresh look at x0 of standard deviation tau:
        x_s = s^2 (x / sigma^2 + (D + tau n) / tau^2),    1 / tau^2 = 1 / s^2 - 1 / sigma^2.
    In D, along a singular vector of value S, put lambda of A+ y, which carries noise of standard deviation sigma_y / S:
        D' = D + V lambda(S) V^T (A+ y - D),    lambda = min(1, S tau / sigma_y),
    and draw that much less, variance tau^2 - (lambda sigma_y / S)^2: the noise of x_s is s again in every direction.
    DDNM's a_t is 1 - s^2 / sigma^2 here, its sigma_t is a_t tau, its gamma_t is a_t^2 times the variance drawn; the
    values S of A are those of its appendix.  sigma_y = 0 is `null_space` around the ancestral sampler.

    That holds for one step.  The next meets the same noise of y again, in x, where it is not independent any more, and
    with many small steps, whose tau is large, y is trusted until x is nearly done: what noise is left then is the
    denoiser's to remove, which it does where x0 has structure (tests/test_restore.py has a case in closed form).
    """
    if sigma_y < 0:
        raise ValueError(
            f"sigma_y={sigma_y}: the noise of the measurement, a standard deviation in units of x0, is 0 or more"
        )
    known = operator.pinv(y)
    _check(known, x)
    for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        denoised = yield Query(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device))
        tau = following * sigma / math.sqrt(sigma**2 - following**2)

        def trusted(values: Tensor, tau: float = tau) -> Tensor:  # lambda
            return (values * tau / sigma_y).clamp(max=1) if sigma_y else torch.ones_like(values)

        def kept(values: Tensor, tau: float = tau) -> Tensor:  # share of the noise that is still to be drawn
            return (1 - (trusted(values) * sigma_y / (values * tau)).square()).clamp(min=0).sqrt()

        look = denoised + operator.spectral(known - denoised, trusted)
        if following > 0:
            n = noise(step).to(x)
            look = look + tau * (n + operator.spectral(n, lambda values: kept(values) - 1))
        x = look + (x - look) * (following / sigma) ** 2
    return x


def time_travel(solver: Solver, x: Tensor, sigmas: Tensor, noise: Noise, *, length: int, repeats: int) -> Conversation:
    """Go each stretch of `length` steps `repeats` times, with fresh noise back up.  [DDNM; RePaint, Alg. 1]

    What the model filled in and what is known come to agree: each return forgets the details and keeps the whole.  The
    cost is `repeats` times the evaluations; repeats = 1 is the solver itself.  A multistep solver starts anew in each
    stretch.  Every number of `noise` is used once.
    """
    if length < 1 or repeats < 1:
        raise ValueError(f"length={length}, repeats={repeats}: stretches of 1 step or more, gone once or more")
    if repeats == 1:
        return (yield from solver(x, sigmas, noise))
    number = 0
    for start in range(0, len(sigmas) - 1, length):
        stretch = sigmas[start : start + length + 1]
        for again in range(repeats):
            if again:
                up = (stretch[0] ** 2 - stretch[-1] ** 2).sqrt()
                x = x + up.to(x) * noise(number).to(x)
                number += 1
            x = yield from solver(x, stretch, lambda step, first=number: noise(first + step))
            number += len(stretch) - 1
    return x


def residual(operator: LinearOperator, x0: Tensor, y: Tensor) -> Tensor:
    """||A x0 - y|| / sqrt(dim y): how far x0 is from the measurement, root mean square in units of x0.  Returns (B,)."""
    off = (operator.forward(x0) - y).flatten(1)
    return off.norm(dim=1) / math.sqrt(max(1, off.shape[1]))


def _check(known: Tensor, x: Tensor) -> None:
    if known.shape[1:] != x.shape[1:] or len(known) not in (1, len(x)):
        raise ValueError(
            f"y measures pictures {tuple(known.shape)}, the sampler draws {tuple(x.shape)}: give one measurement, or one"
            f" for each picture, of its size"
        )
