"""Samplers as conversations: a sampler asks "what is D(x; sigma)?", whoever drives it answers.  It never calls a network."""

from collections.abc import Callable, Generator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[..., Tensor]  # (x (B, C, H, W), sigma (B,), **cond) -> E[x0 given x] (B, C, H, W)


class Query(NamedTuple):
    """What is D(x; sigma) under this condition?  Every value of `cond` is a tensor with B rows."""

    x: Tensor  # (B, C, H, W)
    sigma: Tensor  # (B,)
    cond: Mapping[str, Tensor] = {}


Conversation = Generator[Query, Tensor, Tensor]  # yields queries, is sent D(x; sigma), returns x0


def _ask(x: Tensor, sigma: Tensor) -> Query:
    return Query(x, sigma.to(x).expand(len(x)))


def ddim(x: Tensor, sigmas: Tensor) -> Conversation:
    """First-order solution of dx/dsigma = (x - D(x; sigma)) / sigma.  sigmas: (n + 1,), decreasing.  [DDIM, Eq. 13]"""
    for sigma, following in pairwise(sigmas):
        denoised = yield _ask(x, sigma)
        x = denoised + (x - denoised) * (following / sigma).to(x)
    return x


def heun(x: Tensor, sigmas: Tensor) -> Conversation:
    """Second-order solution of the same equation, two evaluations a step but for the last.  [EDM, Alg. 1]"""
    for sigma, following in pairwise(sigmas):
        slope = (x - (yield _ask(x, sigma))) / sigma.to(x)
        x_euler = x + (following - sigma).to(x) * slope
        if following == 0:  # the slope there is 0 / 0: the last step stays Euler
            return x_euler
        slope_next = (x_euler - (yield _ask(x_euler, following))) / following.to(x)
        x = x + (following - sigma).to(x) * (slope + slope_next) / 2
    return x


def dpmpp_2m(x: Tensor, sigmas: Tensor) -> Conversation:
    """Second-order multistep in lambda = -ln sigma, one evaluation a step.  [DPM-Solver++, Alg. 2]"""
    previous, h_previous = None, None
    for sigma, following in pairwise(sigmas):
        denoised = yield _ask(x, sigma)
        if following == 0:
            return denoised
        h = (sigma / following).log()
        target = denoised
        if previous is not None:
            ratio = (h / (2 * h_previous)).to(x)
            target = (1 + ratio) * denoised - ratio * previous
        x = target + (x - target) * (following / sigma).to(x)
        previous, h_previous = denoised, h
    return x


SAMPLERS: dict[str, Callable[[Tensor, Tensor], Conversation]] = {"heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def evaluations(sampler: str, steps: int) -> int:
    """Network evaluations of one unguided trajectory."""
    return 2 * steps - 1 if sampler == "heun" else steps


def run(conversation: Conversation, denoise: Denoise) -> Tensor:
    """Hold a conversation to its end with one denoiser.  Returns x0 (B, C, H, W)."""
    with torch.no_grad():
        query = next(conversation)
        while True:
            try:
                query = conversation.send(denoise(query.x, query.sigma, **query.cond))
            except StopIteration as done:
                return done.value
