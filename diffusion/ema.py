"""Power-function averages of the weights: their width is a share of the run, so it never needs tuning to its length."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


def gamma_of_sigma_rel(sigma_rel: float) -> float:
    """Exponent gamma of the averaging profile t^gamma whose relative width is sigma_rel, in (0, 0.288).  [EDM2, Alg. 2]

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the largest root of a cubic.
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def decay(images_seen: int, batch_size: int, gamma: float) -> float:
    """Weight of the old average when the clock moves from images_seen - batch_size to images_seen.  [EDM2, Sec. 3.1]"""
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


class Snapshot(NamedTuple):
    """The power average of one relative width, as it was at images_seen."""

    images_seen: int
    sigma_rel: float


def post_hoc_coefficients(snapshots: Sequence[Snapshot], target: Snapshot) -> tuple[np.ndarray, float]:
    """How to add up stored averages to get one of another width.  Returns (coefficients (n,) float64, error).

    An average up to t is <p, w> = integral of p(tau) w(tau), with the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)
    on [0, t] - exactly so for what `PowerEMA` keeps, w being the weights after each step, held until the next.  The
    coefficients c make sum c_i p_i the least-squares approximation of the target's profile; `error` is the root mean square
    of what is left, relative to the target's.  The result then differs from the true average by at most
    error ||p_target|| ||w - constant||.  [EDM2, Sec. 3.2 and Alg. 3]

    Unlike the paper's our coefficients sum to 1, as profiles do: weights that stand still come out unchanged, where a
    dozen snapshots would otherwise shrink them by a percent.
    """
    _check_post_hoc(snapshots, target)
    everything = [*snapshots, target]
    t = np.array([s.images_seen for s in everything], dtype=np.float64) / target.images_seen
    gamma = np.array([gamma_of_sigma_rel(s.sigma_rel) for s in everything])
    products = _profile_products(t, gamma)
    length = np.sqrt(np.diag(products))
    cosines = products / np.outer(length, length)  # of unit profiles: the system is better conditioned
    # least squares under sum c = 1, by a Lagrange multiplier; lstsq because near profiles are nearly dependent
    ones = (length[-1] / length[:-1])[:, None]
    system = np.block([[cosines[:-1, :-1], ones], [ones.T, np.zeros((1, 1))]])
    scaled = np.linalg.lstsq(system, np.append(cosines[:-1, -1], 1.0), rcond=None)[0][:-1]
    left = 1 - 2 * scaled @ cosines[:-1, -1] + scaled @ cosines[:-1, :-1] @ scaled
    return scaled * ones[:, 0], float(np.sqrt(max(left, 0.0)))


def combine(averages: Iterable[dict[str, Tensor]], coefficients: Iterable[float]) -> dict[str, Tensor]:
    """sum c_i average_i, name by name, summed in float64.  Returns float32.  Averages are read one at a time."""
    total: dict[str, Tensor] = {}
    for average, coefficient in zip(averages, coefficients, strict=True):
        if total and total.keys() != average.keys():
            raise ValueError(f"averages of different networks: {sorted(total.keys() ^ average.keys())[:5]}")
        for name, value in average.items():
            part = value.double() * float(coefficient)
            total[name] = total[name] + part if name in total else part
    return {name: value.float() for name, value in total.items()}


def _profile_products(t: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """<p_i, p_j> of power profiles that end at t_i: with t_i <= t_j,
    (gamma_i + 1) (gamma_j + 1) / (gamma_i + gamma_j + 1) (t_i / t_j)^gamma_j / t_j.  Returns (n, n).  [EDM2, Alg. 3]
    """
    earlier = t[:, None] <= t[None, :]
    last = np.where(earlier, t[None, :], t[:, None])
    first = np.where(earlier, t[:, None], t[None, :])
    exponent = np.where(earlier, gamma[None, :], gamma[:, None])
    a, b = gamma[:, None], gamma[None, :]
    return (a + 1) * (b + 1) / (a + b + 1) * (first / last) ** exponent / last


def _check_post_hoc(snapshots: Sequence[Snapshot], target: Snapshot) -> None:
    if not snapshots:
        raise ValueError("no snapshots to reconstruct an average from: name checkpoints of the run")
    for s in (*snapshots, target):
        if s.images_seen < 1 or not 0 < s.sigma_rel < 12**-0.5:
            raise ValueError(f"{s}: give images_seen >= 1 and a relative width between 0 and 0.28")
    if target.images_seen > (last := max(s.images_seen for s in snapshots)):
        raise ValueError(f"{target}: the last snapshot is of images_seen={last}: later weights are in none of them")
