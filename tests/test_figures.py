"""figures.py: FLOP/s are those of the pictures that were trained on, of whatever size, over all processes."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusion.flops import unet_flops
from diffusion.peak import peaks
from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.training.figures import FIGURES, Figures, memory_mib, peak_of
from diffusion.training.loop import alone

UNET = UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=(8,))
CPU = torch.device("cpu")


def batch_of(n: int, size: tuple[int, int], latents: bool = False) -> SimpleNamespace:
    images = torch.zeros(n, 3, *size, dtype=torch.uint8)
    return SimpleNamespace(images=images, keys=["k"] * n, latents=torch.zeros(n, 2, 4, *size) if latents else None)


def told(figures: Figures, batches: list[SimpleNamespace], images_per_s: float) -> dict[str, float]:
    records: list[dict] = []
    assert list(figures.counted(iter(batches))) == batches
    figures.telling(records.append)({"images_seen": 9, "images_per_s": images_per_s})
    return records[0]


def test_each_size_counts_for_what_it_costs_and_each_record_for_its_own_window():
    recipe = TrainRecipe(unet=UNET)
    figures = Figures(recipe, 32, peak=1e9, device=CPU, gather=alone)
    square, wide = (3 * unet_flops(UNET, resolution=32, size=size) for size in ((32, 32), (16, 56)))
    first = told(figures, [batch_of(2, (32, 32)), batch_of(6, (16, 56))], images_per_s=4.0)
    assert first["flop_per_s"] == pytest.approx(4.0 * (2 * square + 6 * wide) / 8)
    assert first["mfu"] == pytest.approx(first["flop_per_s"] / 1e9)
    second = told(figures, [batch_of(1, (32, 32))], images_per_s=4.0)
    assert second["flop_per_s"] == pytest.approx(4.0 * square)
    assert set(second) == {"images_seen", "images_per_s", *FIGURES}


def test_latents_cost_what_the_network_sees():
    latent = {"codec": "autoencoder-kl", "codec_channels": 4, "codec_factor": 4}
    figures = Figures(TrainRecipe(unet=UNET, **latent), 128, peak=1e9, device=CPU, gather=alone)
    record = told(figures, [batch_of(2, (32, 32), latents=True)], images_per_s=1.0)
    assert record["flop_per_s"] == 3 * unet_flops(UNET, resolution=32, picture_channels=4)


def test_processes_are_added_up_and_the_largest_is_the_memory():
    """The other process has trained on as many larger pictures, and holds a terabyte."""
    large = 3 * unet_flops(UNET, resolution=64)
    figures = Figures(
        TrainRecipe(unet=UNET), 64, peak=1e9, device=CPU, gather=lambda own: [own, (2 * large, 2, 2.0**20)]
    )
    record = told(figures, [batch_of(2, (32, 32))], images_per_s=10.0)
    small = 3 * unet_flops(UNET, resolution=64, size=(32, 32))
    assert record["flop_per_s"] == pytest.approx(10.0 * (small + large) / 2)
    assert record["memory_mib"] == 2**20


def test_the_peak_is_the_higher_of_both_over_all_processes():
    found = peaks(torch.float32, budget_s=0.0)
    assert set(found) == {"matmul", "conv"}
    assert all(1e8 < rate < 1e15 for rate in found.values())
    gathered: list = []
    both = peak_of(TrainRecipe(unet=UNET), CPU, lambda value: gathered.append(value) or [value, value])
    assert both == 2 * gathered[-1]


def test_memory_is_that_of_this_process():
    """At least what it holds now, whatever it held before, and no more than the machine has."""
    held = torch.ones(2**24)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert held.nbytes <= resident
    assert 0.98 * resident / 2**20 <= memory_mib(CPU)  # the kernel counts in bunches of pages
    assert memory_mib(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
