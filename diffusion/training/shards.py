"""What one of several processes holds of a network that is divided over them: some rows of each parameter.

Whole weights are known to the forward and the backward pass alone, a block of the U-Net at a time.  Optimizer, averages,
clipping and checkpoints deal with a process's own rows: plain tensors, in the memory of torch's DTensors.
[ZeRO: Rajbhandari et al. 2020, stage 3; Zhao et al. 2023, "PyTorch FSDP"]
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion.unet import Attention, Block, CrossAttention, UNet


class Rows(NamedTuple):
    """Which rows, along the first dimension, of a tensor."""

    shape: tuple[int, ...]  # of the whole
    start: int
    count: int

    def of(self, whole: Tensor) -> Tensor:
        return whole[self.start : self.start + self.count]


def rows_of(shape: tuple[int, ...], rank: int, world: int) -> Rows:
    """The rows of a process: ceil(n / world) to each from the first on, until there are no more, as FSDP2 deals them out."""
    each = -(-shape[0] // world)
    start = min(rank * each, shape[0])
    return Rows(tuple(shape), start, min(each, shape[0] - start))


def units_of(net: UNet) -> list[nn.Module]:
    """What is gathered whole to compute, one after the other.  The rest of the network is one more, and stays to the end."""
    return [module for module in net.modules() if isinstance(module, Block | Attention | CrossAttention)]


@dataclass(frozen=True)
class Shards:
    """This process's rows of every parameter, by name."""

    rank: int
    world: int
    whole: dict[str, DTensor]  # the network's own, while it does not compute
    own: dict[str, nn.Parameter]  # rows of them, in the same memory
    weights: nn.ParameterList  # those of them that are averaged

    def rows(self, name: str) -> Rows:
        return rows_of(tuple(self.whole[name].shape), self.rank, self.world)

    def take_gradients(self) -> None:
        """Hand the gradients that a backward pass left in the network to the rows; the next one starts without any."""
        for name, whole in self.whole.items():
            self.own[name].grad, whole.grad = whole.grad.to_local(), None

    def clip_gradients(self, most: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` of the whole gradient: the same norm, (), on every process."""
        own = list(self.own.values())
        square = torch.nn.utils.get_total_norm([rows.grad for rows in own], foreach=True) ** 2
        dist.all_reduce(square)
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(own, most, norm, foreach=True)
        return norm


def shards_of(net: nn.Module, beside: dict[str, nn.Module], rank: int, world: int) -> Shards:
    """Of modules that `fully_shard` has divided: `net`, whose parameters are averaged, and those beside it by what their
    parameters' names begin with."""
    whole = dict(net.named_parameters())
    averaged = list(whole)
    for prefix, module in beside.items():
        whole |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    own = {name: nn.Parameter(parameter.detach().to_local()) for name, parameter in whole.items()}
    shards = Shards(rank, world, whole, own, nn.ParameterList(own[name] for name in averaged))
    for name, rows in own.items():
        assert len(rows) == shards.rows(name).count
    return shards
