"""Codecs behind one signature: pictures to latents and back.  They are frozen: nothing here learns.

A latent is what the network sees in a picture's place, so a picture of 256 x 256 costs as one of 32 x 32.  [Rombach et al.
2022, "High-resolution image synthesis with latent diffusion models", Sec. 3.1]  `store.codecs` finds, verifies and loads
their weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.random import Stream, normal
from diffusion.recipe import Frozen
from diffusion.threads import one_thread

Run = Callable[[Tensor], Tensor]


class CodecIdentity(Frozen):
    """What must be equal for a picture to become the same latents: a network draws for the codec that it was trained on."""

    name: str
    digest: str  # of configuration and weights: sha256 of the names and sha256 of their files
    channels: int  # of a latent
    factor: int  # side of a picture over that of its latent
    scaling: float
    shift: float
    precision: str = "float32"

    def __str__(self) -> str:
        return (
            f"{self.name} {self.digest[:12]} ({self.channels} channels, {self.factor} times smaller, {self.precision})"
        )

    def side(self, resolution: int) -> int:
        """Side of the latents of square pictures.  Raises ValueError where pictures of this side have none."""
        if resolution % self.factor:
            raise ValueError(
                f"pictures of {resolution} x {resolution} pixels: {self.name} makes them {self.factor} times smaller, so"
                f" their side must be divisible by {self.factor}"
            )
        return resolution // self.factor


@dataclass(frozen=True)
class Codec:
    """Pictures in [-1, 1] -> mean and standard deviation of their latents, and latents -> pictures.

    Latents are scaled as the codec's network says, (z - shift) scaling.  Each picture is computed alone and by one thread,
    so what it becomes depends neither on those beside it nor on the threads of its process, in no bit.
    """

    identity: CodecIdentity
    moments: Run  # (1, 3, H, W) -> (1, 2, C, h, w): mean and standard deviation of z
    picture: Run  # z (1, C, h, w) -> (1, 3, H, W)
    device: str = "cpu"

    @torch.no_grad()
    @one_thread()
    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1], any device.  Returns (B, 2, C, h, w) float32: mean and standard deviation.

        Raises ValueError for a side that the factor does not divide.
        """
        c, (h, w) = self.identity, (self.identity.side(side) for side in x.shape[2:])
        latents = torch.empty(len(x), 2, c.channels, h, w, device=self.device)
        for row in range(len(x)):
            mean, std = self.moments(x[row : row + 1].to(self.device)).squeeze(0).unbind(0)
            latents[row, 0], latents[row, 1] = (mean - c.shift) * c.scaling, std * c.scaling
        return latents

    @torch.no_grad()
    @one_thread()
    def decode(self, x0: Tensor) -> Tensor:
        """Latents (B, C, h, w), any device -> pictures (B, 3, H, W), about in [-1, 1]."""
        z = x0.to(self.device) / self.identity.scaling + self.identity.shift
        return torch.cat([self.picture(z[row : row + 1]) for row in range(len(z))])


def drawn(latents: Tensor, *, seed: int, index: Tensor) -> Tensor:
    """mean + standard deviation times noise, which is a function of (seed, index).  Returns (B, C, h, w).

    latents (B, 2, C, h, w) of `Codec.encode`, index (B,) int64.  [Kingma & Welling 2014, "Auto-encoding variational Bayes",
    Sec. 2.4]
    """
    mean, std = latents.unbind(1)
    return mean + std * normal(seed, Stream.LATENT, index, tuple(mean.shape[1:]))
