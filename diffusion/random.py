"""Counter-based random numbers: f(seed, stream, index), whatever the device, the batch layout or the order of asking.

Philox4x32-10 [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11].  key = (seed, stream), counter =
(block, index low, index high, 0); a block gives four 32-bit words.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """One number per use, so that no two uses share randomness.  Never renumber: pictures would change."""

    NOISE = 1  # training noise
    SIGMA = 2  # training noise level
    LABEL_DROP = 3
    AUGMENT = 4
    INITIAL = 5  # a sample's starting noise
    CHURN = 6  # noise of stochastic samplers
    HOLDOUT = 7  # noise of the held-out losses
    WEIGHTS = 8  # initial weights
    DEGRADATION = 9  # what a network in training is shown of a picture
    BOUND = 10  # steps and noise of the held-out bound
    CAPTION = 12  # which pictures' captions an evaluation draws from
    WORDS = 13  # which of a picture's captions a position shows
    LATENT = 15  # where in its codec's distribution a picture's latent lies
    NAME = 16  # words that name sets of pictures


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10 of counters (..., 4) int64, each word in [0, 2^32).  Returns the same shape."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of the unsigned product
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def bits(seed: int, stream: Stream, index: Tensor, n: int) -> Tensor:
    """n random 32-bit words for each index.  index: (B,) int64, >= 0.  Returns (B, n) int64 in [0, 2^32)."""
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed={seed}: give a whole number from 0 to {_MASK}")
    blocks = -(-n // 4)
    shape = (len(index), blocks)
    block = torch.arange(blocks, device=index.device).expand(shape)
    low, high = (index & _MASK)[:, None].expand(shape), (index >> 32)[:, None].expand(shape)
    words = philox(torch.stack([block, low, high, torch.zeros_like(block)], dim=-1), (seed, int(stream)))
    return words.reshape(len(index), blocks * 4)[:, :n]


def uniform(seed: int, stream: Stream, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float32 (B, *shape).  index: (B,) int64."""
    words = bits(seed, stream, index, math.prod(shape))
    # 23 bits and a half: every value is exact in float32 and neither 0 nor 1 can come out
    return (((words >> 9).float() + 0.5) * 2.0**-23).view(len(index), *shape)


def normal(seed: int, stream: Stream, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Unit Gaussian noise, float32 (B, *shape), |z| <= 6.7.  index: (B,) int64.  [Box & Muller 1958]"""
    n = math.prod(shape)
    words = bits(seed, stream, index, n + n % 2).float().view(len(index), -1, 2)
    radius = ((words[..., 0] + 1) * 2.0**-32).log_().mul_(-2).sqrt_()  # float32 rounds 2^32 - 1 up: the log is <= 0
    angle = words[..., 1] * (2 * math.pi * 2.0**-32)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :n].reshape(len(index), *shape)
