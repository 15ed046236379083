"""Data parallelism over torch.distributed, for whoever starts the processes.  With one process there is none."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusion.recipe import TrainRecipe
from diffusion.training.exact import AddUp, check_workers, tree_sum
from diffusion.training.loop import Gather, alone
from diffusion.training.optimizer import (
    Division,
    RowDivision,
    divided_step,
    hidden_matrices,
    optimizer_over,
    step_by_rows,
)
from diffusion.training.shards import rows_of, shards_of, units_of
from diffusion.training.step import TrainState, device_of


def world_gather(*, beside: bool = False) -> Gather:
    """`gather` over the processes that torch.distributed joins: values are pickled, among these processes only.
    beside: for a thread beside the training, on connections of its own.  Every process then asks for one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return alone
    group = dist.new_group(backend="gloo") if beside else None

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
        return values

    return gather


def exchange(tensors: list[torch.Tensor]) -> None:
    """Fill tensors[rank] with the values that it has on that rank, for all ranks.  Shapes agree everywhere."""
    sent = [dist.broadcast(tensor, src=rank, async_op=True) for rank, tensor in enumerate(tensors) if tensor.numel()]
    for work in sent:
        work.wait()


def exchange_rows(parts: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """Send parts[rank] to each rank.  Returns what each sent to this one, sizes[rank] numbers."""
    received = parts[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(parts), sizes, [part.numel() for part in parts])
    return list(received.split(sizes))


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
    division = Division(dist.get_rank(), dist.get_world_size(), exchange)
    state.optimizer.muon_step = partial(divided_step, division=division)
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


def shard(state: TrainState, recipe: TrainRecipe) -> None:
    """Divide weights, gradients, optimizer and averages of a state that has taken no step over the processes (FSDP2).

    A block of the U-Net at a time is gathered whole where it computes, in the forward and again in the backward pass, and
    its gradients are averaged into rows as they come in.  Numbers are those of `data_parallel` but for the order of sums.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    assert recipe.micro_batch is None
    assert not state.optimizer.state
    rank, world = dist.get_rank(), dist.get_world_size()
    net, hidden = state.net, {id(matrix) for matrix in hidden_matrices(state.net)}
    names = [name for name, parameter in net.named_parameters() if id(parameter) in hidden]
    mesh = init_device_mesh(device_of(state).type, (world,))
    for unit in units_of(net.net):
        fully_shard(unit, mesh=mesh)
    beside = {"uncertainty": state.uncertainty} if state.uncertainty else {}
    if state.uncertainty:
        fully_shard(state.uncertainty.out, mesh=mesh)  # not the whole, which answers with a view: FSDP2 warns of that
    fully_shard(net, mesh=mesh)
    shards = shards_of(net, beside, rank, world)
    for average in state.ema.averages.values():
        average[:] = [rows_of(tuple(whole.shape), rank, world).of(whole).clone() for whole in average]
    matrices = {shards.own[name]: tuple(shards.whole[name].shape) for name in names}
    state.shards, state.optimizer = shards, optimizer_over(recipe, list(shards.own.values()), list(matrices))
    state.optimizer.muon_step = partial(step_by_rows, division=RowDivision(rank, world, matrices, exchange_rows))


def check_sharding(recipe: TrainRecipe) -> None:
    """Raises ValueError where a run's weights cannot be divided over its workers."""
    if recipe.micro_batch is not None:
        raise ValueError(
            f"train.micro_batch={recipe.micro_batch} asks for the same bits on any number of workers, and weights that are"
            " divided over them (DIFFUSION_SHARD_WEIGHTS) are summed in an order that depends on it: leave out one of both"
        )


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
    state.optimizer.muon_step = partial(divided_step, division=Division(dist.get_rank(), world, exchange))

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
