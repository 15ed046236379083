"""A batch of random pictures, a function of where it starts, laid out in memory as a reader's."""

import torch

from diffusion.training.step import Part


def random_batch(start: int, size: int, *, side: int, classes: int) -> Part:
    """The pictures at the global positions [start, start + size)."""
    generator = torch.Generator().manual_seed(start)
    pixels = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, generator=generator)
    index = torch.arange(start, start + size)
    keys = [str(position) for position in index.tolist()]
    return Part(pixels.permute(0, 3, 1, 2), index % classes, [""] * size, keys, index, None)
