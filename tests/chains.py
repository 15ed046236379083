"""Chains of every schedule, and what goes into them, for the tests of the process and of its bound."""

import pytest
import torch

from diffusion.process import Chain
from diffusion.random import Stream, normal
from diffusion.schedule import cosine_betas, linear_betas, source_text_betas, zero_terminal_snr

F64 = torch.float64
CHAINS = {
    "linear": Chain(linear_betas(20, first=0.01, last=0.4)),
    "cosine": Chain(cosine_betas(20)),
    "source text": Chain(source_text_betas(20)),
    "zero SNR": Chain(zero_terminal_snr(linear_betas(20, first=0.01, last=0.4))),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def steps(t: int, batch: int = 1) -> torch.Tensor:
    return torch.full((batch,), t)


def noises(seed: int, *shape: int) -> torch.Tensor:
    return normal(seed, Stream.NOISE, torch.arange(shape[0]), shape[1:]).double()
