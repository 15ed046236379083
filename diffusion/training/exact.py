"""The exact mode (train.micro_batch): the same bits, whatever the number of processes.

A global batch is cut into micro-batches, the same for any number of processes; the gradient of each is computed alone, and
all are summed along one binary tree.  A process sums the branches it holds; processes then go on with the branches of all.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffusion.recipe import TrainRecipe

# tensors of each process -> on every process, in place, their `tree_sum` by rank
AddUp = Callable[[list[Tensor]], None]


def tree_sum(terms: Iterable[list[Tensor]]) -> list[Tensor]:
    """Sum n >= 1 lists of tensors, element by element, in place: the first 2^k of them, for the largest 2^k < n, plus the
    rest, and either likewise.

    So sums of equal runs of 2^j neighbours, summed the same way, are the sum of all, to the bit.  Terms are asked for one by
    one; log2(n) + 1 lists at most are held at a time.
    """
    sums: list[tuple[int, list[Tensor]]] = []  # of so many neighbours each: the binary digits of the terms so far
    for term in terms:
        size = 1
        while sums and sums[-1][0] == size:
            term = _plus(sums.pop()[1], term)
            size *= 2
        sums.append((size, term))
    _, total = sums.pop()
    while sums:
        total = _plus(sums.pop()[1], total)
    return total


def _plus(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def workers_of(recipe: TrainRecipe) -> tuple[int, ...]:
    """The numbers of workers that the batch can be divided over, ascending.  In the exact mode each holds whole branches of
    the tree: 2^j micro-batches, or all."""
    divisors = [n for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0]
    if recipe.micro_batch is None:
        return tuple(divisors)
    parts = recipe.batch_size // recipe.micro_batch
    return tuple(n for n in divisors if n == 1 or (parts % n == 0 and (parts // n).bit_count() == 1))


def check_workers(recipe: TrainRecipe, workers: int) -> None:
    """Raises ValueError where `workers` cannot divide the batch."""
    allowed = workers_of(recipe)
    if workers in allowed:
        return
    if recipe.micro_batch is None:
        raise ValueError(
            f"batch_size={recipe.batch_size} cannot be divided over {workers} workers equally: choose a number of"
            f" workers that divides it"
        )
    parts = recipe.batch_size // recipe.micro_batch
    raise ValueError(
        f"batch_size={recipe.batch_size} and micro_batch={recipe.micro_batch} make {parts} micro-batches, which {workers}"
        f" workers cannot sum in the order in which one does: choose {' or '.join(map(str, allowed))} workers"
    )


def worlds_of(recipe: TrainRecipe, workers: int | tuple[int, int]) -> tuple[int, ...]:
    """The numbers of workers, ascending, that may train a recipe where a site gives a number, or the least and the most.

    Raises ValueError where there is none.
    """
    if isinstance(workers, int):
        check_workers(recipe, workers)
        return (workers,)
    least, most = workers
    allowed = workers_of(recipe)
    worlds = tuple(n for n in allowed if least <= n <= most)
    if not worlds:
        exact = "" if recipe.micro_batch is None else f" and micro_batch={recipe.micro_batch}"
        raise ValueError(
            f"no number of workers from {least} to {most} divides batch_size={recipe.batch_size}{exact}: let there be"
            f" {' or '.join(map(str, allowed))}"
        )
    return worlds
