"""Noise levels: which sigma a sampler visits and which sigma training draws."""

import torch
from torch import Tensor


def karras_sigmas(n: int, *, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0.  Returns (n + 1,) float64.  [EDM, Eq. 5]"""
    if n < 2:
        raise ValueError(f"n={n}: need at least 2 levels, one at sigma_max and one at sigma_min")
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + u * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def log_normal_sigma(u: Tensor, *, mean: float, std: float) -> Tensor:
    """Training noise levels with ln sigma ~ N(mean, std^2), by inversion of u in (0, 1), any shape.  [EDM, Table 1]"""
    return (mean + std * torch.special.ndtri(u.double())).exp().to(u.dtype)
