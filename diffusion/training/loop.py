"""The training loop: steps and hooks.  It cannot tell one process from many: `model` or `add_up`, and `gather`, hide it."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusion.recipe import TrainRecipe, checkpoints_of
from diffusion.training.corrupt import LEVELS, Batch
from diffusion.training.exact import AddUp
from diffusion.training.step import (
    NonFiniteLoss,
    StepResult,
    TrainState,
    device_of,
    end_of,
    raise_if_not_finite,
    train_step,
)

Gather = Callable[[Any], list[Any]]  # a value of each process -> the values of all, by rank, on every process
_RECORDS = 200  # metrics records of a run, about
_UNITS = 2**149  # float32 numbers are whole multiples of 1 / _UNITS


def alone(value: Any) -> list[Any]:
    """`gather` of a single process."""
    return [value]


def ignore(_: Any) -> None:
    """A hook that does nothing."""


def metrics_images_of(recipe: TrainRecipe) -> int:
    """Images between two metrics records: whole batches, about two hundred records a run."""
    return max(recipe.images // _RECORDS // recipe.batch_size, 1) * recipe.batch_size


def train(
    state: TrainState,
    batches: Iterator[Batch],
    recipe: TrainRecipe,
    *,
    model: nn.Module | None = None,
    add_up: AddUp | None = None,
    on_metrics: Callable[[dict[str, float]], None] = ignore,
    on_checkpoint: Callable[[TrainState], None] = ignore,
    gather: Gather = alone,
    metrics_images: int | None = None,
) -> None:
    """Train `state` from where it is to the end of the recipe.

    batches: this process's share of each global batch, from position state.images_seen on.
    model, add_up: of `train_step`.
    on_metrics, on_checkpoint: called on every process, at the first step that reaches a multiple of `metrics_images`
    (default `metrics_images_of`), and at `checkpoints_of` the recipe.  A checkpoint is preceded by metrics, so
    that records never span one and a resumed run repeats exactly those of the run it replays.
    Raises NonFiniteLoss, on every process, naming the pictures of all.
    """
    every = metrics_images or metrics_images_of(recipe)
    end, moments = end_of(recipe), set(checkpoints_of(recipe))
    window = _Window()
    unread: tuple[StepResult, Batch, int] | None = None
    on_cpu = device_of(state).type == "cpu"
    while state.images_seen < end:
        before = state.images_seen
        waiting = time.perf_counter()
        batch = next(batches)
        window.waited_s += time.perf_counter() - waiting
        try:
            result = train_step(state, batch, recipe, model=model, add_up=add_up)
            if unread:  # the step before: read only now, the device had this one to work on meanwhile
                raise_if_not_finite(*unread)
            window.results.append(result)
            unread = None if on_cpu else (result, batch, before)
            to_save = state.images_seen in moments
            to_log = to_save or _reached(before, state.images_seen, every)
            if to_log and unread:
                raise_if_not_finite(*unread)
                unread = None
        except NonFiniteLoss as error:
            samples = tuple(sample for part in gather(error.samples) for sample in part)
            raise NonFiniteLoss(error.images_seen, error.grad_norm, samples) from None
        if to_log:
            on_metrics(window.summary(state.images_seen, end, recipe, gather))
            window = _Window()
        if to_save:
            stopping = time.perf_counter()
            on_checkpoint(state)
            window.stopped_s += time.perf_counter() - stopping


def _reached(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


@dataclass
class _Window:
    """The steps since the last metrics record."""

    results: list[StepResult] = field(default_factory=list)
    waited_s: float = 0.0  # for batches
    stopped_s: float = 0.0  # by a checkpoint
    started: float = field(default_factory=time.perf_counter)

    def summary(self, images_seen: int, end: int, recipe: TrainRecipe, gather: Gather) -> dict[str, float]:
        """Means over the window and over all processes; `wait_share` and `checkpoint_share` are the slowest process's.  A
        checkpoint counts in the window that begins with it, so the run's last counts in none."""
        losses = torch.cat([result.losses for result in self.results])
        level = torch.cat([result.level for result in self.results])
        norms = torch.stack([result.grad_norm for result in self.results]).tolist()
        of_level = [losses[level == i].tolist() for i in range(LEVELS)]
        mine = [*(sum(map(_whole, own)) for own in of_level), *map(len, of_level), self.waited_s, self.stopped_s]
        shares = gather(mine)
        total = [sum(column) for column in zip(*shares, strict=True)]
        sums, counts = [whole / _UNITS for whole in total[:LEVELS]], total[LEVELS : 2 * LEVELS]
        elapsed_s = time.perf_counter() - self.started
        images_per_s = len(self.results) * recipe.batch_size / elapsed_s
        return {
            "images_seen": images_seen,
            "images": end,
            "loss": sum(total[:LEVELS]) / (_UNITS * sum(counts)),
            **{f"loss_level_{i}": s / n for i, (s, n) in enumerate(zip(sums, counts, strict=True)) if n},
            "grad_norm": math.fsum(norms) / len(norms),
            "lr": self.results[-1].lr,
            "images_per_s": images_per_s,
            "eta_s": (end - images_seen) / images_per_s,
            "wait_share": max(share[-2] for share in shares) / elapsed_s,
            "checkpoint_share": max(share[-1] for share in shares) / elapsed_s,
        }


def _whole(loss: float) -> int:
    """A float32 number as a multiple of the smallest one.  Whole numbers have one sum, however they are divided."""
    return int(loss * _UNITS)
