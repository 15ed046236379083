"""Power-function averages of the weights: their width is a share of the run, so it never needs tuning to its length."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """Exponent gamma of the averaging profile t^gamma whose relative width is sigma_rel, in (0, 0.288).  [EDM2, Eq. 126]

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the largest root of a cubic.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def decay(images_seen: int, batch_size: int, gamma: float) -> float:
    """Weight of the old average when the clock moves from images_seen - batch_size to images_seen.  [EDM2, Eq. 127]"""
    return (1 - batch_size / images_seen) ** (gamma + 1)


class PowerEMA:
    """One average of a network's parameters for each relative width.  Buffers are not averaged: ours has constants only.

    The first update replaces the initial weights entirely (its decay is 0), so the average never remembers them.
    """

    def __init__(self, net: nn.Module, sigma_rels: Iterable[float]) -> None:
        self.names = [name for name, _ in net.named_parameters()]
        self.averages = {s: [p.detach().float().clone() for p in net.parameters()] for s in sigma_rels}

    @torch.no_grad()
    def update(self, net: nn.Module, images_seen: int, batch_size: int) -> None:
        """Call once after each optimizer step; images_seen counts that step's batch."""
        weights = [p.detach() for p in net.parameters()]
        for sigma_rel, average in self.averages.items():
            torch._foreach_lerp_(average, weights, 1 - decay(images_seen, batch_size, gamma_of_sigma_rel(sigma_rel)))

    def state_dict(self, sigma_rel: float) -> dict[str, Tensor]:
        """Name -> averaged parameter, float32, of one width.  They are the live tensors, not copies."""
        if sigma_rel not in self.averages:
            raise KeyError(f"no EMA of relative width {sigma_rel}; there are {sorted(self.averages)}")
        return dict(zip(self.names, self.averages[sigma_rel], strict=True))

    @torch.no_grad()
    def load_state_dict(self, sigma_rel: float, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        own = self.state_dict(sigma_rel)
        if own.keys() != state.keys():
            raise ValueError(f"EMA {sigma_rel}: parameters differ: {sorted(own.keys() ^ state.keys())[:5]}")
        for name, average in own.items():
            average.copy_(state[name])
