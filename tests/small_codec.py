"""A real AutoencoderKL, small and of random weights, in a folder as diffusers writes it."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diffusion.recipe import TrainRecipe
from diffusion.store.codecs import FOLDERS

CHANNELS, FACTOR = 4, 4
VARIABLE = FOLDERS["autoencoder-kl"]


def network(seed: int = 0, **changed: object) -> AutoencoderKL:
    """Side / FACTOR, CHANNELS channels, about 100,000 weights, a function of the seed."""
    levels = 3  # FACTOR = 2 to the number of levels less 1
    shape = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8, 16, 16),
        "latent_channels": CHANNELS,
        "norm_num_groups": 8,
        "scaling_factor": 0.7,
        "shift_factor": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**(shape | changed)).eval().requires_grad_(False)


def saved(folder: Path, seed: int = 0, **changed: object) -> Path:
    """The folder with such a network."""
    network(seed, **changed).save_pretrained(folder)
    return folder


def drawing_latents(recipe: TrainRecipe, **changed: object) -> TrainRecipe:
    """The same recipe on latents."""
    latents = {"codec": "autoencoder-kl", "codec_channels": CHANNELS, "codec_factor": FACTOR, "sigma_data": 1.0}
    return TrainRecipe.model_validate(recipe.model_dump() | latents | changed)
