"""The optimizers of a run, as one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.recipe import TrainRecipe
from diffusion.unet import Conv, UNet


@dataclass(frozen=True)
class Division:
    """How processes that hold the same parameters and gradients divide the work of a step among them."""

    rank: int
    world: int
    # given a tensor for each rank: afterwards each holds its rank's values, on every process
    exchange: Callable[[list[Tensor]], None]


class Optimizers:
    """Several optimizers that share the parameters of a network between them: one state, one list of groups, one step.

    division: set where several processes take the same step, so that its costly part is computed once.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.division: Division | None = None
        self.parts = parts
        self.state = parts[0].state
        for part in parts[1:]:
            part.state = self.state  # a parameter belongs to one part, so they can share the dictionary
        self.param_groups = [group for part in parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, *, skip: Tensor | None = None) -> None:
        """Update the parameters.  skip: () bool on the device; where it is true no parameter changes, without a wait."""
        for part in self.parts:
            if skip is None:
                self._step(part)
            elif part.defaults.get("fused"):
                part.found_inf = skip.float()
                part.step()
            else:
                weights = [p for group in part.param_groups for p in group["params"]]
                before = [p.clone() for p in weights]
                self._step(part)
                for weight, old in zip(weights, before, strict=True):
                    torch.where(skip, old, weight, out=weight)

    def _step(self, part: torch.optim.Optimizer) -> None:
        if self.division and isinstance(part, torch.optim.Muon):
            divided_step(part, self.division)
        else:
            part.step()


def divided_step(muon: torch.optim.Muon, division: Division) -> None:
    """`muon.step()`, bit for bit, though each process orthogonalizes only its share of the matrices.

    The momentum, which costs little, every process keeps of all matrices, so that each has the whole state to save.
    """
    (group,) = muon.param_groups
    matrices = group["params"]
    shares = divide(matrices, division.world)
    group["params"] = shares[division.rank]
    try:
        muon.step()
    finally:
        group["params"] = matrices
    for rank, share in enumerate(shares):
        for weight in share if rank != division.rank else ():
            state = muon.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
    flat = [torch.cat([weight.view(-1) for weight in share]) if share else matrices[0].new_empty(0) for share in shares]
    division.exchange(flat)
    for rank, share in enumerate(shares):
        if rank != division.rank:
            for weight, values in zip(share, flat[rank].split([w.numel() for w in share]), strict=True):
                weight.copy_(values.view_as(weight))


def divide(matrices: list[Tensor], parts: int) -> list[list[Tensor]]:
    """Deal matrices out so that the parts cost about the same to orthogonalize: the costliest first, each to the part
    that has least."""
    shares: list[list[Tensor]] = [[] for _ in range(parts)]
    costs = [0] * parts
    for matrix in sorted(matrices, key=cost_of, reverse=True):
        least = costs.index(min(costs))
        shares[least].append(matrix)
        costs[least] += cost_of(matrix)
    return shares


def cost_of(matrix: Tensor) -> int:
    """Multiplications of one Newton-Schulz iteration on an (m, n) matrix, m <= n: 2 m^2 n + m^3."""
    m, n = sorted(matrix.shape)
    return m * m * (2 * n + m)


def optimizer_of(recipe: TrainRecipe, net: nn.Module) -> Optimizers:
    """AdamW, or Muon for the convolutions between the U-Net's stems and head and AdamW for all else.

    Muon orthogonalizes the momentum of each weight matrix; its step is scaled to the size of AdamW's, so that one learning
    rate serves both.  [Muon; Liu et al. 2025, Sec. 2.2]
    """
    matrices = hidden_matrices(net) if recipe.optimizer == "muon" else []
    taken = {id(parameter) for parameter in matrices}
    adamw = torch.optim.AdamW(
        [parameter for parameter in net.parameters() if id(parameter) not in taken],
        lr=recipe.lr,
        betas=(0.9, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if not matrices:
        return Optimizers([adamw])
    muon = torch.optim.Muon(
        matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return Optimizers([adamw, muon])


def hidden_matrices(net: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions inside the U-Nets of `net`."""
    return [
        conv.weight
        for unet in net.modules()
        if isinstance(unet, UNet)
        for conv in unet.modules()
        if isinstance(conv, Conv) and conv not in (unet.stem, unet.image_stem, unet.head)
    ]
