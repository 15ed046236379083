"""Which pictures an evaluation draws, and its pieces of work: a function of the recipe and the data's class frequencies."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch

from diffusion.data.manifest import Split
from diffusion.evaluation.metrics.splits import allocate
from diffusion.random import Stream, bits
from diffusion.recipe import EvaluateRecipe, Frozen, Setting

REAL_PICTURES = 128  # real pictures per task
RESTORED_PICTURES = 8  # likewise: each takes many answers of the network


class Draw(NamedTuple):
    """One picture to draw.  It depends on class, ordinal and the recipe's seed, so more samples only add pictures.

    `label`, `seed`, the caption and the size are also what the endpoint needs to draw the same picture again.
    """

    label: int
    ordinal: int  # which picture of its class
    seed: int
    measured: bool  # counts in the Frechet distance
    shown: bool  # stands in the grid
    like: int | None = None  # training picture whose caption and size it has; None: there is neither to choose


class Task(Frozen):
    """A piece of work that any worker can do, and whose result depends on nothing else."""

    number: int
    kind: Literal["loss", "bound", "restore", "real", "draw"]
    level: int = 0  # loss: which of recipe.loss_levels
    case: str = ""  # restore: name of a `restoration.Case`
    indices: tuple[int, ...] = ()  # bound, restore: of the measured held-out pictures; real: of the split
    split: Split = "train"  # real: of which pictures
    draws: tuple[Draw, ...] = ()
    setting: Setting | None = None  # draw: how, where not as the bundle says


def draws(class_counts: tuple[int, ...], recipe: EvaluateRecipe, labels: np.ndarray | None = None) -> list[Draw]:
    """All pictures to draw, by class: `recipe.samples` in the data's class frequencies, and what else the grid needs.

    labels: of each training picture, where the model reads captions or draws several sizes.  Each picture is then drawn
    with the caption and in the size of a training picture of its class, each one's once before any comes again.
    """
    plan = []
    for label, measured in enumerate(allocate(list(class_counts), recipe.samples)):
        ordinals = torch.arange(max(measured, recipe.grid_columns))
        seeds = bits(recipe.seed, Stream.INITIAL, (label << 32) + ordinals, 1).flatten().tolist()
        members = [] if labels is None else _shuffled(np.flatnonzero(labels == label), recipe.seed)
        like = [members[i % len(members)] if members else None for i in ordinals.tolist()]
        shown = recipe.grid_columns
        plan += [Draw(label, i, seed, i < measured, i < shown, like[i]) for i, seed in enumerate(seeds)]
    return plan


def _shuffled(pictures: np.ndarray, seed: int) -> list[int]:
    """The pictures in an order that depends on the seed alone."""
    keys = bits(seed, Stream.CAPTION, torch.from_numpy(pictures), 1)[:, 0]
    return pictures[keys.argsort(stable=True).numpy()].tolist()


def evenly(total: int, n: int) -> tuple[int, ...]:
    """n of `total` indices (all, if fewer), evenly spaced: shards may be sorted by class."""
    n = min(n, total)
    return tuple(i * total // n for i in range(n))


def tasks(
    plan: list[Draw],
    recipe: EvaluateRecipe,
    *,
    real: Mapping[Split, tuple[int, ...]],
    holdout: int,
    bound: bool = True,
    cases: Sequence[str] = (),
) -> list[Task]:
    """Every piece of work.  real: pictures whose features are not known yet, by split.  holdout: how many pictures the
    held-out split has for losses.  bound: whether the recipe's is measured, where it asks for one.  cases: names of the
    restorations that are measured.

    Real and restored pictures come between the drawn ones, in proportion: counting drawn pictures then tells how far the
    work is.
    """
    number = count()
    levels = range(len(recipe.loss_levels) if holdout else 0)
    result = [Task(number=next(number), kind="loss", level=level) for level in levels]
    size = recipe.batch_size
    measured = tuple(range(min(holdout, recipe.loss_pictures) if recipe.bound_steps and bound else 0))
    parts = [measured[i : i + size] for i in range(0, len(measured), size)]
    result += [Task(number=next(number), kind="bound", indices=part) for part in parts]
    drawing = [{"kind": "draw", "draws": tuple(plan[i : i + size])} for i in range(0, len(plan), size)]
    reading = [
        {"kind": "real", "split": split, "indices": pictures[i : i + REAL_PICTURES]}
        for split, pictures in real.items()
        for i in range(0, len(pictures), REAL_PICTURES)
    ]
    given = tuple(range(min(holdout, recipe.restoration_pictures)))
    parts = [given[i : i + RESTORED_PICTURES] for i in range(0, len(given), RESTORED_PICTURES)]
    restoring = [{"kind": "restore", "case": case, "indices": part} for part in parts for case in cases]
    places = [(i / len(some), some[i]) for some in (drawing, reading, restoring) for i in range(len(some))]
    return result + [Task(number=next(number), **facts) for _, facts in sorted(places, key=lambda place: place[0])]
