"""What may have been done to a picture that is a copy all the same."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def _jpeg(pictures: Tensor) -> Tensor:
    def again(picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=75)
        return np.array(Image.open(file))

    return torch.from_numpy(np.stack([again(picture) for picture in pictures.numpy()]))


def _noisy(pictures: Tensor) -> Tensor:
    noise = 8 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + noise).clamp(0, 255).round().byte()


CHANGED: dict[str, Callable[[Tensor], Tensor]] = {  # uint8 (N, H, W, 3) -> the same
    "as they are": lambda pictures: pictures,
    "mirrored": lambda pictures: pictures.flip(2),
    "JPEG of quality 75": _jpeg,
    "noise of 8 levels": _noisy,
}
