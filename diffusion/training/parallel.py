"""Data parallelism over torch.distributed, for whoever starts the processes.  With one process there is none."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffusion.recipe import TrainRecipe
from diffusion.training.exact import AddUp, check_workers, tree_sum
from diffusion.training.loop import Gather, alone
from diffusion.training.optimizer import Division
from diffusion.training.step import TrainState, device_of


def world_gather() -> Gather:
    """`gather` over the processes that torch.distributed joins: values are pickled, among these processes only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return alone

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return gather


def exchange(tensors: list[torch.Tensor]) -> None:
    """Fill tensors[rank] with the values that it has on that rank, for all ranks.  Shapes agree everywhere."""
    sent = [dist.broadcast(tensor, src=rank, async_op=True) for rank, tensor in enumerate(tensors) if tensor.numel()]
    for work in sent:
        work.wait()


class _Learned(nn.Module):
    """state.net, with the uncertainty of the loss among its parameters, so that both have their gradients averaged.

    The loss asks state.uncertainty itself: gradients are exchanged as they come in, wherever their parameter was used.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.net, self.uncertainty = state.net, state.uncertainty

    def forward(self, *args: Any, **cond: Any) -> torch.Tensor:
        return self.net(*args, **cond)


def data_parallel(state: TrainState, resolution: int) -> nn.Module:
    """state.net, wrapped so that its gradients are averaged over the processes, each with an equal share of the batch.
    From here on state.optimizer divides its work among them too.  resolution: side of what the network sees.

    Every process holds the same state, the same before as after.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return state.net
    state.optimizer.division = Division(dist.get_rank(), dist.get_world_size(), exchange)
    device = device_of(state)
    model = DistributedDataParallel(
        _Learned(state) if state.uncertainty else state.net,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
    # The gradients' buckets, and with them the order of the sums over three and more ranks, settle after the first
    # backward pass.  Spend it on zeros, or a resumed run would differ in its first step from the uninterrupted one.
    zeros = torch.zeros(1, state.net.net.picture_channels, resolution, resolution, device=device)
    output = model(zeros, torch.ones(1, device=device)).sum()
    if state.uncertainty:
        output = output + state.uncertainty(torch.ones(1, device=device)).sum()
    output.backward()
    state.optimizer.zero_grad()
    return model


def exact_parallel(state: TrainState, recipe: TrainRecipe) -> AddUp | None:
    """What adds the gradients of the processes up in the exact mode, or None of a single process.  From here on
    state.optimizer divides its work among them too.

    Each process sums its slice of the gradients of all, in the order of ranks, and hands the sum out: 2 (W - 1) / W of the
    gradient's bytes go out and come in, as with a ring.
    Raises ValueError where so many processes cannot sum in the order in which one does.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.get_world_size()
    check_workers(recipe, world)
    state.optimizer.division = Division(dist.get_rank(), world, exchange)

    def add_up(tensors: list[torch.Tensor]) -> None:
        sizes = [tensor.numel() for tensor in tensors]
        padding = tensors[0].new_zeros(-sum(sizes) % world)
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), padding])
        slices = torch.empty_like(flat)
        dist.all_to_all_single(slices, flat)
        (mine,) = tree_sum([part] for part in slices.chunk(world))
        dist.all_gather_single(flat, mine)
        for tensor, values in zip(tensors, flat[: sum(sizes)].split(sizes), strict=True):
            tensor.copy_(values.view_as(tensor))

    return add_up
