"""The weighted denoising loss, per sample."""

from collections.abc import Mapping

from torch import Tensor

from diffusion.denoiser import Precond
from diffusion.sampler import Denoise


def denoising_loss(
    denoise: Denoise, precond: Precond, x0: Tensor, noise: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]
) -> Tensor:
    """w(sigma) mean ||D(x0 + sigma n; sigma) - x0||^2 for each picture.  x0, noise (B, C, H, W); sigma (B,).  Returns (B,).

    With w = 1 / c_out^2 a network F that always answers 0 has an expected loss of about 1 at every sigma (exactly 1 when
    the pixels of x0 have standard deviation sigma_data).  [EDM, Eq. 2 and 8]
    """
    denoised = denoise(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, **cond)
    return precond.weight(sigma) * (denoised - x0).square().mean(dim=(1, 2, 3))
