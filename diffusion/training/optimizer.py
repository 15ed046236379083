"""The optimizers of a run, as one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from diffusion.recipe import TrainRecipe
from diffusion.training.shards import rows_of
from diffusion.unet import Conv, UNet


@dataclass(frozen=True)
class Division:
    """How processes that hold the same parameters and gradients divide the work of a step among them."""

    rank: int
    world: int
    # given a tensor for each rank: afterwards each holds its rank's values, on every process
    exchange: Callable[[list[Tensor]], None]


@dataclass(frozen=True)
class RowDivision:
    """Likewise where each process holds some rows of each parameter and of its gradient."""

    rank: int
    world: int
    shapes: dict[nn.Parameter, tuple[int, ...]]  # rows that this process holds -> shape of the whole
    # numbers for each rank, and how many each has for this one -> what they are
    exchange: Callable[[list[Tensor], list[int]], list[Tensor]]


class Optimizers:
    """Several optimizers that share the parameters of a network between them: one state, one list of groups, one step.

    muon_step: set where several processes take the same step, so that its costly part is computed once.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.muon_step: Callable[[torch.optim.Muon], object] = torch.optim.Muon.step
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
        if isinstance(part, torch.optim.Muon):
            self.muon_step(part)
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


def step_by_rows(muon: torch.optim.Muon, division: RowDivision) -> None:
    """`muon.step()` but for rounding, of matrices of which each process holds some rows.

    What is to be orthogonalized comes together on one process, one matrix on each at a time, and goes back as the change of
    the rows.  Momentum and weights stay where they are.
    """
    (group,) = muon.param_groups
    shapes, world = division.shapes, division.world
    shares = divide(group["params"], world, lambda rows: cost_of(torch.empty(shapes[rows], device="meta")))
    nothing = group["params"][0].new_empty(0)
    for turn in zip_longest(*shares):  # a matrix for each process, or None
        sent = [nothing if rows is None else _updated(muon, rows).reshape(-1) for rows in turn]
        mine = turn[division.rank]
        counts = [0 if mine is None else rows_of(shapes[mine], rank, world).count for rank in range(world)]
        width = 0 if mine is None else shapes[mine][1]
        received = division.exchange(sent, [count * width for count in counts])
        whole = nothing if mine is None else _change(muon, torch.cat(received).view(shapes[mine]))
        changes = whole.split(counts)
        back = division.exchange([change.reshape(-1) for change in changes], [part.numel() for part in sent])
        for rows, change in zip(turn, back, strict=True):
            if rows is not None:
                rows.mul_(1 - group["lr"] * group["weight_decay"]).add_(change.view_as(rows))


def _updated(muon: torch.optim.Muon, rows: nn.Parameter) -> Tensor:
    """What Muon orthogonalizes, of some rows, whose momentum goes on: Nesterov's.  [Muon]"""
    momentum, state = muon.param_groups[0]["momentum"], muon.state[rows]
    if not state:
        state["momentum_buffer"] = torch.zeros_like(rows)
    state["momentum_buffer"].lerp_(rows.grad, 1 - momentum)
    return rows.grad.lerp(state["momentum_buffer"], momentum)


def _change(muon: torch.optim.Muon, updated: Tensor) -> Tensor:
    """By what a step without momentum and decay changes a matrix."""
    settings = {name: value for name, value in muon.param_groups[0].items() if name in muon.defaults}
    matrix = nn.Parameter(torch.zeros_like(updated))
    matrix.grad = updated
    torch.optim.Muon([matrix], **settings | {"momentum": 0.0, "weight_decay": 0.0}).step()
    return matrix.detach()


def divide(matrices: list[Tensor], parts: int, cost: Callable[[Tensor], int] | None = None) -> list[list[Tensor]]:
    """Deal matrices out so that the parts cost about the same to orthogonalize: the costliest first, each to the part
    that has least.  cost: of one; `cost_of` it where it is whole."""
    cost = cost or cost_of
    shares: list[list[Tensor]] = [[] for _ in range(parts)]
    costs = [0] * parts
    for matrix in sorted(matrices, key=cost, reverse=True):
        least = costs.index(min(costs))
        shares[least].append(matrix)
        costs[least] += cost(matrix)
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
    return optimizer_over(recipe, list(net.parameters()), hidden_matrices(net))


def optimizer_over(recipe: TrainRecipe, parameters: list[nn.Parameter], hidden: list[nn.Parameter]) -> Optimizers:
    """Likewise of parameters, those among them that Muon may take being `hidden`."""
    matrices = hidden if recipe.optimizer == "muon" else []
    taken = {id(parameter) for parameter in matrices}
    adamw = torch.optim.AdamW(
        [parameter for parameter in parameters if id(parameter) not in taken],
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
