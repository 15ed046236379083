"""Exact answers: denoiser, score and likelihood of Gaussian mixtures, the ground truth of the tests."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """p(x0) = sum_k weight_k N(x0; mean_k, std_k^2 I), and with it p(x; sigma) of x = x0 + sigma n in closed form."""

    weights: Tensor  # (K,), positive, summing to 1
    means: Tensor  # (K, *shape)
    stds: Tensor  # (K,), 0 for a point

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln p(x; sigma) in nats.  x (B, *shape), sigma (B,) >= 0.  Returns (B,)."""
        return torch.logsumexp(self._log_joint(x, sigma), dim=1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma) = E[x0 given x].  x (B, *shape), sigma (B,) > 0.  Returns (B, *shape).

        Each component's own answer, (std^2 x + sigma^2 mean) / (std^2 + sigma^2), weighed by its posterior probability.
        """
        posterior = torch.softmax(self._log_joint(x, sigma), dim=1)
        keep = self.stds**2 / (self.stds**2 + sigma[:, None] ** 2)  # (B, K)
        column = (len(x), -1) + (1,) * (x.dim() - 1)
        answers = keep.view(column) * x[:, None] + (1 - keep).view(column) * self.means
        return (posterior.view(column) * answers).sum(dim=1)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x ln p(x; sigma) = (D(x; sigma) - x) / sigma^2.  [Tweedie; EDM, Eq. 3]"""
        return (self.denoise(x, sigma) - x) / sigma.view(-1, *(1,) * (x.dim() - 1)) ** 2

    def sample(self, u: Tensor, noise: Tensor) -> Tensor:
        """Draws of x0 from u (B,) uniform in (0, 1), which chooses the component, and noise (B, *shape) unit Gaussian."""
        k = torch.searchsorted(self.weights.cumsum(0), u).clamp_(max=len(self.weights) - 1)
        return self.means[k] + self.stds[k].view(-1, *(1,) * (noise.dim() - 1)) * noise

    def _log_joint(self, x: Tensor, sigma: Tensor) -> Tensor:
        """ln (weight_k N(x; mean_k, (std_k^2 + sigma^2) I)).  Returns (B, K)."""
        variance = self.stds**2 + sigma[:, None] ** 2
        distance = (x[:, None] - self.means).square().flatten(2).sum(dim=2)
        n = math.prod(x.shape[1:])
        return self.weights.log() - distance / (2 * variance) - n / 2 * (2 * math.pi * variance).log()
