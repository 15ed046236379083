"""Degradations: the measurements from which a network is trained to restore pictures.

Which one a picture gets is a function of (seed, its position in the global order), like its noise.  [Saharia et al. 2022,
"Palette"] has one network for several tasks, told apart by what stands beside x; here that is one rule for all operators.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.operators import BlockMean, Grey, LinearOperator, Mask
from diffusion.random import Stream, bits
from diffusion.recipe import TaskName

FACTORS = (2, 4, 8)  # of super-resolution
UNMEASURED = 0.1  # share of pictures shown without a measurement: so the network also draws freely
_GRIDS = (4, 8, 16, 32)  # sides of the noise that free-form masks are made of, from blots to specks
_CHOICES = 16  # words for what is chosen; those of the free-form masks come after them


def image_channels(tasks: Sequence[TaskName]) -> int:
    """Channels of what stands beside x in a network trained for these tasks."""
    return 6 if tasks else 0


def beside(operator: LinearOperator, x: Tensor) -> Tensor:
    """What a network is shown of A x: A+ A x, and (A^T A)^(1/2) 1, what each number weighs in it.  Returns (B, 6, H, W).

    x (B, 3, H, W): any pictures that measure so, such as A+ y.  The weight is 1 where a number itself is known, 1 / factor
    where the mean of its block is, unequal among the colours for a grey, and 0 where nothing is known; so a picture of
    zeros is no measurement at all, and tasks and factors are told apart everywhere.
    """
    weight = operator.spectral(torch.ones_like(x[:1]), lambda values: values)
    return torch.cat([operator.spectral(x, torch.ones_like), weight.expand_as(x)], dim=1)


def degraded(x0: Tensor, operators: Sequence[LinearOperator | None]) -> Tensor:
    """`beside` of each picture of a batch under its own operator, zeros for those without one.

    x0 (B, 3, H, W), B operators.  Returns (B, 6, H, W) on x0's device.
    """
    groups: dict[LinearOperator | None, list[int]] = {}  # equal operators at once
    for row, operator in enumerate(operators):
        groups.setdefault(operator, []).append(row)
    # the order is the CPU's, so that nothing waits for the device
    order = torch.tensor([row for rows in groups.values() for row in rows]).to(x0.device, non_blocking=True)
    parts = zip(groups, x0.index_select(0, order).split([len(rows) for rows in groups.values()]), strict=True)
    nothing = x0.new_zeros(1, 2 * x0.shape[1], *x0.shape[2:])
    shown = [beside(a, part) if a else nothing.expand(len(part), -1, -1, -1) for a, part in parts]
    return torch.cat(shown).index_select(0, order.argsort())


def operators_of(
    index: Tensor, side: int, *, seed: int, tasks: Sequence[TaskName], device: torch.device | str = "cpu"
) -> list[LinearOperator | None]:
    """The measurement at each position of square pictures, None at the share UNMEASURED; tasks and factors equally often.

    index (B,) int64, on the CPU.  Masks are put on `device`.
    """
    u = _unit(bits(seed, Stream.DEGRADATION, index, 3))
    factors = [BlockMean(factor) for factor in FACTORS if side % factor == 0]
    task = torch.where(u[:, 0] < UNMEASURED, len(tasks), (u[:, 1] * len(tasks)).long())
    names = [[*tasks, None][number] for number in task.tolist()]
    masked = index[torch.tensor([name == "inpainting" for name in names])].to(device, non_blocking=True)
    masks = (Mask(keep.expand(3, side, side)) for keep in masks_of(masked, side, seed=seed))
    chosen = (u[:, 2] * len(factors)).long().tolist()

    def one(name: TaskName | None, factor: int) -> LinearOperator | None:
        if name is None:
            return None
        return next(masks) if name == "inpainting" else Grey() if name == "colorization" else factors[factor]

    return [one(name, factor) for name, factor in zip(names, chosen, strict=True)]


def masks_of(index: Tensor, side: int, *, seed: int) -> Tensor:
    """What is known of each picture: half are one or two rectangular holes, or all but these, half have any form.

    index (B,) int64.  Returns (B, side, side) bool.  The forms are smoothed noise against a threshold; its numbers have 8
    bits, so that interpolating a grid that goes into `side` a power of 2 times is exact, the same on every device.
    """
    words = bits(seed, Stream.DEGRADATION, index, _CHOICES + max(_GRIDS) ** 2)
    u = _unit(words[:, 3:_CHOICES])
    holes = _rectangles(u[:, :8].view(-1, 2, 4), side)
    hole = holes[:, 0] | (holes[:, 1] & _column(u[:, 8] < 0.5))
    rectangular = hole == _column(u[:, 9] < 0.25)  # known where there is no hole, in a quarter where there is one
    noise = (words[:, _CHOICES:] & 255).float().view(-1, 1, max(_GRIDS), max(_GRIDS))
    smooth = [F.interpolate(noise[..., :n, :n], size=(side, side), mode="bilinear")[:, 0] for n in _GRIDS]
    chosen = F.one_hot((u[:, 10] * len(_GRIDS)).long(), len(_GRIDS)).bool()
    form = sum(_column(chosen[:, i]) * values for i, values in enumerate(smooth))
    free = form > _column(255 * (0.25 + 0.5 * u[:, 11]))
    return torch.where(_column(u[:, 12] < 0.5), rectangular, free)


def _rectangles(u: Tensor, side: int) -> Tensor:
    """Rectangles of any size and place.  u (B, N, 4) in [0, 1).  Returns (B, N, side, side) bool, true inside."""
    size = 1 + (u[..., :2] * side).long()
    first = (u[..., 2:] * (side - size + 1)).long()
    line = torch.arange(side, device=u.device)
    inside = (line >= first[..., None]) & (line < (first + size)[..., None])
    return inside[..., 0, :, None] & inside[..., 1, None, :]


def _unit(words: Tensor) -> Tensor:
    """32-bit words as float64 in [0, 1), exactly."""
    return words.double() * 2.0**-32


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)
