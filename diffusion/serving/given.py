"""Pictures and masks that come with a request, and what they are at the size at which the model works."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.data.images import fit, load, to_model
from diffusion.data.pictures.buckets import Size, nearest
from diffusion.data.pictures.fit import cropped
from diffusion.serving.request import RequestError
from diffusion.store.bundle_spec import BundleSpec


@dataclass(frozen=True, eq=False)
class Given:
    """A picture file, read."""

    image: Image.Image  # RGB or RGBA, upright
    sha256: str  # of the file
    hole: str | None = None  # of a mask: "transparent" where that, and not white, is drawn anew

    @classmethod
    def of(cls, data: bytes, param: str) -> "Given":
        """From the file's bytes.  param: the request's name for it.  Raises RequestError saying what is wrong with it."""
        try:
            return cls(load(data), hashlib.sha256(data).hexdigest())
        except ValueError as error:
            raise RequestError(f"{param} cannot be read as a picture: {error}", param=param) from error

    def as_hole(self) -> "Given":
        """Of a mask whose transparent parts are to be drawn anew, as OpenAI's are: the same in white on black, and of one
        without transparency itself."""
        if self.image.mode != "RGBA" or self.image.getextrema()[3][0] == 255:
            return self
        clear = self.image.getchannel("A").point(lambda alpha: 255 * (alpha < 128))
        return Given(clear.convert("RGB"), self.sha256, hole="transparent")


def size_for(image: Image.Image, spec: BundleSpec) -> Size:
    """(height, width) at which a model works on a picture: of its sizes the one nearest to the picture's shape."""
    return nearest(image.width, image.height, spec.sizes) if spec.sizes else spec.size


def fit_note(image: Image.Image, size: Size) -> tuple[str, ...]:
    """What `at_size` does to the picture, in words, if anything."""
    height, width = size
    if image.size == (width, height):
        return ()
    window = "square" if height == width else f"{width}:{height}"
    return (f"the centred {window} of the picture, {image.width} x {image.height}, to {width} x {height}",)


def at_size(image: Image.Image, size: Size, device: torch.device) -> Tensor:
    """The picture's centred square, or window of another shape, as the model takes it: (1, 3, *size) in [-1, 1]."""
    return to_model(torch.from_numpy(fit(image, size=size, background="#ffffff"))[None]).to(device)


def has_pixels(image: Image.Image, size: Size, factor: int) -> bool:
    """Whether a picture has the pixels of `size` made smaller by a factor, which divides it."""
    high, wide = cropped(image.height, image.width, size)
    return high >= size[0] // factor and wide >= size[1] // factor and not (size[0] % factor or size[1] % factor)


def check_mask(mask: Image.Image, picture: Image.Image) -> None:
    """Raises RequestError where they are of unlike size."""
    if mask.size != picture.size:
        raise RequestError(
            f"the mask is {mask.width} x {mask.height}, the picture {picture.width} x {picture.height}: give a mask of the"
            f" picture's size, white where something new is to come",
            param="mask",
        )


def keep_of(mask: Image.Image, size: Size) -> Tensor:
    """What to keep, (3, *size) bool: where the mask is dark or transparent.  Raises RequestError where that is all."""
    values = np.asarray(fit(mask, size=size, background="#000000"), np.float32).mean(axis=2)
    keep = torch.from_numpy(values < 128)
    if bool(keep.all()):
        raise RequestError(
            "the mask is dark everywhere: nothing would change. White is where something new comes", param="mask"
        )
    return keep.expand(3, *size)
