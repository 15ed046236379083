"""What a training run will take, before it is started and without its hardware: sizes, memory, exchange, shards of a rank.

Nothing is computed: the network is built and asked with tensors that have shapes and no values, so that a recipe for many
large GPUs is planned on a laptop.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from diffusion.data.manifest import Manifest
from diffusion.data.reading_order import order_of
from diffusion.denoiser import Denoiser
from diffusion.flops import training_flops
from diffusion.recipe import TrainRecipe, checkpoints_of
from diffusion.training.exact import check_workers
from diffusion.training.optimizer import hidden_matrices
from diffusion.training.shards import units_of
from diffusion.training.step import net_of

_FLOAT = 4  # bytes: weights and all that is kept of them are float32
_LOOKED_AT = 2**20  # pictures of the order, from its beginning


class Memory(NamedTuple):
    """Bytes that one worker holds at the end of its forward pass, when most is held."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


class Ranks(NamedTuple):
    """What the ranks read of the first epoch, or of its first million pictures."""

    pictures: int  # looked at
    all: int  # shards
    shards: tuple[int, ...]  # that each rank opens
    at_once: int  # shards that one rank's part of one global batch lies in, at most
    bytes: tuple[int, ...]  # of the shards that each rank opens


class Plan(NamedTuple):
    """A run on `world` workers."""

    world: int
    share: int  # pictures of a global batch on each worker
    shape: tuple[int, ...]  # of what the network sees there at once, (b, C, H, W)
    parameters: int
    steps: int
    checkpoints: int
    checkpoint_bytes: int  # of one
    flops: int  # of a step on one worker, forward and backward
    memory: Memory
    gradient_bytes: int  # summed over the workers in each step
    update_bytes: int  # sent from worker to worker for Muon's divided step, and of weights that are gathered


def plan_of(
    recipe: TrainRecipe, *, side: int, classes: int, world: int, recompute: bool = False, sharded: bool = False
) -> Plan:
    """The plan of a run on squares of `side` pixels, or of a latent's numbers; pictures in buckets are no larger.
    recompute: gradient checkpointing.  sharded: weights and what is kept of them are divided over the workers.

    The memory is that of tensors: libraries' workspaces and what the allocator leaves unused come on top.
    Raises ValueError where the batch cannot be divided over `world` workers.
    """
    check_workers(recipe, world)
    share = recipe.batch_size // world
    at_once = min(recipe.micro_batch or share, share)
    sums = (share // at_once - 1).bit_length() + 1  # of gradients, which `exact.tree_sum` holds
    shape = (at_once, recipe.codec_channels, side, side)
    with FakeTensorMode():
        net = net_of(recipe, side=side, classes=classes)
        net.net.recompute = recompute
        activations = activation_bytes(net, inputs(net, shape, recipe.text_tokens))
    parameters = numbers_of(net)
    matrices = sum(weight.numel() for weight in hidden_matrices(net)) if recipe.optimizer == "muon" else 0
    weights = parameters * _FLOAT
    optimizer = (2 * (parameters - matrices) + matrices) * _FLOAT  # AdamW keeps two moments, Muon one
    parts, gathered, exchanged = 1, 0, matrices * _FLOAT
    if sharded and world > 1:
        units = sorted(numbers_of(unit) * _FLOAT for unit in units_of(net.net))
        rest = weights - sum(units)
        # one is gathered while the one before it computes, in the forward and in the backward pass; the rest once
        parts, gathered, exchanged = world, rest + sum(units[-2:]), rest + 2 * sum(units) + 2 * matrices * _FLOAT
    memory = Memory(
        weights=weights // parts + gathered,
        gradients=sums * weights // parts,
        optimizer=optimizer // parts,
        averages=len(recipe.ema) * weights // parts,
        activations=activations,
    )
    moments = checkpoints_of(recipe)
    return Plan(
        world=world,
        share=share,
        shape=shape,
        parameters=parameters,
        steps=moments[-1] // recipe.batch_size,
        checkpoints=len(moments),
        checkpoint_bytes=weights + optimizer + len(recipe.ema) * weights,
        flops=training_flops(recipe, side=side, batch=share, tokens=recipe.text_tokens),
        memory=memory,
        gradient_bytes=weights if world > 1 else 0,
        update_bytes=exchanged if world > 1 else 0,
    )


def numbers_of(module: nn.Module) -> int:
    """How many numbers its parameters have."""
    return sum(parameter.numel() for parameter in module.parameters())


def inputs(net: Denoiser, shape: tuple[int, ...], tokens: int) -> dict[str, Tensor]:
    """Arguments of a call of the network, on pictures of this shape, with every condition that it was built for."""
    count, _, height, width = shape
    given = {"x": torch.zeros(shape), "sigma": torch.ones(count), "label": torch.zeros(count, dtype=torch.long)}
    if net.net.text_width:
        given["text"] = torch.zeros(count, tokens, net.net.text_width)
        given["text_mask"] = torch.ones(count, tokens, dtype=torch.bool)
    if net.net.image_channels:
        given["image"] = torch.zeros(count, net.net.image_channels, height, width)
    return given


def activation_bytes(net: nn.Module, given: dict[str, Tensor]) -> int:
    """Bytes of memory that a forward pass keeps for the backward pass, besides the parameters themselves."""
    own = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage()._cdata] = value  # held, so that no other storage takes its address
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        output = net(**given)
    del output
    return sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in own)


def ranks_of(manifest: Manifest, recipe: TrainRecipe, world: int) -> Ranks:
    """Which shards the ranks read, a function of the manifest and the recipe."""
    order, entries = order_of(manifest, "train", recipe), manifest.entries("train")
    batches = max(1, min(len(order), _LOOKED_AT) // recipe.batch_size)
    ends = np.cumsum([entry.pictures for entry in entries])
    shards = np.searchsorted(ends, order.at(0, batches * recipe.batch_size), side="right")
    by_rank = shards.reshape(batches, world, recipe.batch_size // world)
    opened = [np.unique(by_rank[:, rank]) for rank in range(world)]
    parts = np.sort(by_rank, axis=2)
    sizes = np.array([entry.bytes for entry in entries])
    return Ranks(
        pictures=batches * recipe.batch_size,
        all=len(entries),
        shards=tuple(map(len, opened)),
        at_once=int(1 + (np.diff(parts, axis=2) > 0).sum(axis=2).max()),
        bytes=tuple(int(sizes[own].sum()) for own in opened),
    )
