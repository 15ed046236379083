"""The two ways of resizing pictures for a network whose published numbers are to be met.  They move a Frechet distance by
several percent, so an extractor's identity names its own."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BICUBIC = "bicubic, antialiased, clamped to 0..255"
TENSORFLOW = "bilinear, as TensorFlow 1 does it"


def bicubic(x: Tensor, resolution: int) -> Tensor:
    """(B, 3, H, W) in [0, 255] -> (B, 3, resolution, resolution) in [0, 255]: Pillow's, and so clean-fid's.
    [Parmar et al. 2022]"""
    if x.shape[-2:] == (resolution, resolution):
        return x
    x = F.interpolate(x, size=(resolution, resolution), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 255)


def tensorflow1(x: Tensor, resolution: int) -> Tensor:
    """Likewise as `tf.image.resize_bilinear` of TensorFlow 1 by default, and so the first Frechet distances and
    torch-fidelity: pixel i lies at i times the ratio of the sides and not at its centre, and nothing is averaged where a
    picture becomes smaller.  [Heusel et al. 2017]"""
    for dim in (2, 3):
        x = _along(x, dim, resolution)
    return x


def _along(x: Tensor, dim: int, resolution: int) -> Tensor:
    side = x.shape[dim]
    place = torch.arange(resolution, device=x.device, dtype=torch.float32) * (side / resolution)
    lower = place.floor().long().clamp(max=side - 1)
    share = (place - lower).view(-1, *(1,) * (3 - dim))
    low, high = x.index_select(dim, lower), x.index_select(dim, (lower + 1).clamp(max=side - 1))
    return low + (high - low) * share


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {BICUBIC: bicubic, TENSORFLOW: tensorflow1}
