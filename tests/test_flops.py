"""flops.py: the formula against the counter that watches torch compute."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion.flops import unet_flops
from diffusion.presets import PRESETS
from diffusion.recipe import UNetRecipe
from diffusion.unet import UNet

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": (1, 2), "attention": (8,)}


def counted(
    recipe: UNetRecipe, resolution: int, batch: int, tokens: int, *, image_channels: int = 0, gradients: bool = False
) -> int:
    net = UNet(**recipe.model_dump(), resolution=resolution, classes=3, image_channels=image_channels)
    net.requires_grad_(gradients)
    text = {"text": torch.randn(batch, tokens, recipe.text_width)} if tokens else {}
    x = torch.randn(batch, 3, resolution, resolution)
    label = torch.zeros(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        out = net(x, torch.zeros(batch), label, **text)
        if gradients:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("change", "resolution", "batch", "tokens", "image_channels"),
    [
        ({}, 16, 1, 0, 0),
        ({}, 32, 3, 0, 0),
        ({"stem": 1}, 16, 2, 0, 0),
        ({"stem": 4, "attention": ()}, 32, 1, 0, 0),
        ({"attention": (8, 4), "multipliers": (3, 2), "blocks": (2, 1)}, 16, 1, 0, 0),
        ({"channels": 112, "multipliers": (1,), "blocks": (1,)}, 16, 1, 0, 0),
        ({"text_width": 24}, 16, 2, 0, 0),
        ({"text_width": 24}, 16, 2, 7, 0),
        ({}, 16, 2, 0, 4),
        ({"text_width": 8, "attention": (8, 4)}, 16, 2, 5, 3),
    ],
)
def test_the_formula_is_what_torch_counts(change, resolution, batch, tokens, image_channels):
    recipe = UNetRecipe(**SMALL | change)
    expected = counted(recipe, resolution, batch, tokens, image_channels=image_channels)
    priced = unet_flops(recipe, resolution=resolution, batch=batch, tokens=tokens, image_channels=image_channels)
    assert priced == expected


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_counted_too(name):
    recipe = PRESETS[name]()
    side = recipe.shard.resolution // recipe.train.codec_factor
    with FakeTensorMode():  # shapes alone: some are of hundreds of millions of weights
        expected = counted(recipe.train.unet, side, 1, 0)
    assert unet_flops(recipe.train.unet, resolution=side) == expected


@pytest.mark.parametrize(("change", "size"), [({}, (24, 40)), ({"stem": 4, "text_width": 24}, (64, 16))])
def test_pictures_of_other_shapes_cost_their_own(change, size):
    """Attention stays on the levels where the square of that resolution has it."""
    recipe = UNetRecipe(**SMALL | change)
    net = UNet(**recipe.model_dump(), resolution=32, classes=3).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, *size), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    assert unet_flops(recipe, resolution=32, batch=2, size=size) == counter.get_total_flops()


def test_forward_and_backward_cost_three_times_forward():
    """But for the gradients of what comes in, which nothing needs."""
    recipe = UNetRecipe(**SMALL)
    assert counted(recipe, 16, 2, 0, gradients=True) == pytest.approx(
        3 * unet_flops(recipe, resolution=16, batch=2), rel=0.05
    )
