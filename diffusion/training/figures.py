"""What a run shows beside its losses: FLOP/s, their share of the measured peak, memory."""

import resource
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from diffusion.flops import training_flops
from diffusion.peak import peaks
from diffusion.recipe import TrainRecipe
from diffusion.training.corrupt import Batch
from diffusion.training.loop import Gather

FIGURES = ("flop_per_s", "mfu", "memory_mib")  # functions of the machine, not of the recipe


class Figures:
    """Adds figures to the metrics records of `training.loop.train`: the loop takes its batches and tells its records through
    `counted` and `telling`, on every process.

    peak: FLOP/s of all processes together.  The FLOPs are the U-Net's and its teacher's; of one that reads captions the few
    that read tokens are left out, whose number differs from batch to batch.
    """

    def __init__(
        self, recipe: TrainRecipe, resolution: int, *, peak: float, device: torch.device, gather: Gather
    ) -> None:
        """resolution: of the pictures."""
        self.peak, self._device, self._gather = peak, device, gather
        self._flops, self._images = 0, 0  # since the last record, of this process

        @cache
        def cost(size: tuple[int, int]) -> int:
            return training_flops(recipe, side=resolution // recipe.codec_factor, size=size)

        self._cost = cost  # of a picture

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, counted when the loop takes them."""
        for batch in batches:
            shown = batch.images if batch.latents is None else batch.latents
            self._flops += len(batch.keys) * self._cost(tuple(shown.shape[-2:]))
            self._images += len(batch.keys)
            yield batch

    def telling(self, tell: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        """The hook `on_metrics` that tells the record with these figures in it.

        flop_per_s: of all processes.  mfu: as a share of the peak.  memory_mib: the most that one process ever held, of
        its device where that is a GPU.
        """

        def on_metrics(record: dict[str, Any]) -> None:
            flops, images, memory = zip(
                *self._gather((self._flops, self._images, memory_mib(self._device))), strict=True
            )
            self._flops = self._images = 0
            rate = record["images_per_s"] * sum(flops) / sum(images)
            tell(record | dict(zip(FIGURES, (rate, rate / self.peak, max(memory)), strict=True)))

        return on_metrics


def peak_of(recipe: TrainRecipe, device: torch.device, gather: Gather) -> float:
    """FLOP/s of all processes in the precision of the recipe, measured on all at once, as they will train: the higher of
    matrix product and convolution."""
    gather(None)  # they begin together
    found = peaks(torch.bfloat16 if recipe.precision == "bf16" else torch.float32, device)
    if device.type == "cuda":  # what was measured with is no part of what training holds
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return sum(gather(max(found.values())))


def memory_mib(device: torch.device) -> float:
    """The most memory that this process ever held: on a GPU allocated tensors, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
