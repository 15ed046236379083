"""The denoiser D(x; sigma): a network F inside the preconditioning that says what F predicts, and how one prediction
becomes another."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion.recipe import PredictionName, UNetRecipe
from diffusion.unet import UNet


class Precond(Protocol):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), each coefficient a function of sigma of any shape.  [EDM, Eq. 7]

    What F predicts is (D - c_skip x) / c_out.  The textbook's predictions are of the variance-preserving
    z = x / sqrt(1 + sigma^2) = alpha x0 + s n with alpha = 1 / sqrt(1 + sigma^2), s = sigma alpha, so their network sees z:
    c_in = alpha.
    """

    def c_skip(self, sigma: Tensor) -> Tensor: ...
    def c_out(self, sigma: Tensor) -> Tensor: ...
    def c_in(self, sigma: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EDM:
    """Input and target of F have unit variance at every sigma.  [EDM, Table 1]"""

    sigma_data: float = 0.5  # standard deviation of a pixel of x0

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()


@dataclass(frozen=True)
class Epsilon:
    """F predicts the noise n: x = x0 + sigma n, so D = x - sigma F.  [DDPM, Eq. 12]"""

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return -sigma

    def c_in(self, sigma: Tensor) -> Tensor:
        return _alpha(sigma)


@dataclass(frozen=True)
class V:
    """F predicts v = alpha n - s x0.  [Salimans & Ho 2022, Sec. 4]

    alpha z - s v = (alpha^2 + s^2) x0 = x0, so D = alpha^2 x - s F.  It is EDM at sigma_data = 1 with the sign turned.
    """

    def c_skip(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return -sigma * _alpha(sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        return _alpha(sigma)


@dataclass(frozen=True)
class X0:
    """F predicts x0, which is D itself."""

    def c_skip(self, sigma: Tensor) -> Tensor:
        return torch.zeros_like(sigma)

    def c_out(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        return _alpha(sigma)


def precond_of(prediction: PredictionName, sigma_data: float) -> Precond:
    """The preconditioning of a prediction; `sigma_data` is EDM's alone."""
    known: dict[str, Precond] = {"edm": EDM(sigma_data), "epsilon": Epsilon(), "v": V(), "x0": X0()}
    if prediction not in known:
        raise ValueError(f"prediction={prediction!r}: choose one of {', '.join(known)}")
    return known[prediction]


def c_noise(sigma: Tensor) -> Tensor:
    """How every network is told the noise level.  [EDM, Table 1]"""
    return sigma.log() / 4


def denoised_of(prediction: Tensor, x: Tensor, sigma: Tensor, precond: Precond) -> Tensor:
    """D(x; sigma) of what a network predicted.  prediction, x (B, *shape), sigma (B,) >= 0, finite.  At 0 it is x, by
    whatever it was predicted but x0."""
    sigma = _column(sigma, x)
    return precond.c_skip(sigma) * x + precond.c_out(sigma) * prediction


def prediction_of(denoised: Tensor, x: Tensor, sigma: Tensor, precond: Precond) -> Tensor:
    """What a network must predict for its denoiser to answer `denoised`: the inverse of `denoised_of`.

    At sigma = 0 x is x0 and holds no noise, so only x0 can be told from it; at sigma = inf, the end of a chain with zero
    terminal SNR, there is no x.
    """
    sigma = _column(sigma, x)
    c_out = precond.c_out(sigma)
    if not (sigma.isfinite().all() and c_out.all()):
        raise ValueError(
            f"sigma={sigma.flatten().tolist()}: a denoised picture is turned into another prediction at finite sigma > 0"
            f" only. At 0 ask for x0, which is x; instead of infinity start at the last finite level of the chain."
        )
    return (denoised - precond.c_skip(sigma) * x) / c_out


def linear(x: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """The best linear D(x; sigma) where the pixels have standard deviation sigma_data: EDM's around F = 0.  sigma (B,)."""
    return EDM(sigma_data).c_skip(_column(sigma, x)) * x


def _alpha(sigma: Tensor) -> Tensor:
    return 1 / (1 + sigma**2).sqrt()


def _column(sigma: Tensor, x: Tensor) -> Tensor:
    """(B,) to the shape that multiplies x (B, *shape)."""
    return sigma.view(-1, *(1,) * (x.dim() - 1))


class Denoiser(nn.Module):
    """D(x; sigma) = E[x0 given x], in float32 around a network that computes in `precision`.

    x (B, C, H, W), sigma (B,) > 0, label (B,) int64 in [0, classes], where `classes` is the null label; the other
    conditions are those of `UNet.forward`.
    """

    def __init__(self, net: UNet, *, sigma_data: float, precision: str, prediction: PredictionName = "edm") -> None:
        super().__init__()
        self.net = net
        self.sigma_data = sigma_data
        self.precond = precond_of(prediction, sigma_data)
        self.precision = precision

    @property
    def null_label(self) -> int:
        return self.net.classes

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None, **conditions: Tensor) -> Tensor:
        if label is None:
            label = torch.full((len(x),), self.null_label, device=x.device)
        scaled = (self.precond.c_in(_column(sigma, x)) * x).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            raw = self.net(scaled, c_noise(sigma), label, **conditions)
        return denoised_of(raw.float(), x, sigma, self.precond)


def denoiser_of(
    recipe: UNetRecipe,
    *,
    resolution: int,
    classes: int,
    sigma_data: float,
    precision: str,
    prediction: PredictionName = "edm",
    channels: int = 3,
    image_channels: int = 0,
    seed: int = 0,
) -> Denoiser:
    """The denoiser of a recipe for square pictures, or latents, of so many channels, its initial weights a function of
    `seed`."""
    net = UNet(
        **recipe.model_dump(),
        resolution=resolution,
        classes=classes,
        picture_channels=channels,
        image_channels=image_channels,
        seed=seed,
    )
    return Denoiser(net, sigma_data=sigma_data, precision=precision, prediction=prediction)
