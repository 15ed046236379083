"""The denoiser D(x; sigma): a network F inside the preconditioning that makes its task equally hard at every noise level."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.recipe import UNetRecipe
from diffusion.unet import UNet


@dataclass(frozen=True)
class Precond:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).  [EDM, Table 1]"""

    sigma_data: float = 0.5  # standard deviation of a pixel of x0

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        return sigma.log() / 4

    def weight(self, sigma: Tensor) -> Tensor:
        # 1 / c_out^2 makes the expected loss the same at every sigma when F starts at 0.  [EDM, Eq. 8]
        return 1 / self.c_out(sigma) ** 2


class Denoiser(nn.Module):
    """D(x; sigma) = E[x0 given x], in float32 around a network that computes in `precision`.

    x (B, C, H, W), sigma (B,) > 0, label (B,) int64 in [0, classes], where `classes` is the null label; the other
    conditions are those of `UNet.forward`.
    """

    def __init__(self, net: UNet, *, sigma_data: float, precision: str) -> None:
        super().__init__()
        self.net = net
        self.precond = Precond(sigma_data)
        self.precision = precision

    @property
    def null_label(self) -> int:
        return self.net.classes

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, **conditions: Tensor) -> Tensor:
        if label is None:
            label = torch.full((len(x),), self.null_label, device=x.device)
        column = sigma.view(-1, 1, 1, 1)
        scaled = (self.precond.c_in(column) * x).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            raw = self.net(scaled, self.precond.c_noise(sigma), label, **conditions)
        return self.precond.c_skip(column) * x + self.precond.c_out(column) * raw.float()


def denoiser_of(
    recipe: UNetRecipe, *, resolution: int, classes: int, sigma_data: float, precision: str, seed: int = 0
) -> Denoiser:
    """The denoiser of a recipe for square RGB pictures, its initial weights a function of `seed`."""
    net = UNet(**recipe.model_dump(), resolution=resolution, classes=classes, seed=seed)
    return Denoiser(net, sigma_data=sigma_data, precision=precision)
