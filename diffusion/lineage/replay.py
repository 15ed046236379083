"""Drawing a picture again from its receipt, and what is to be said of the two.

A picture is a function of the bundle and the request, and its receipt names both.  On the same kind of device, with the
same torch, the pixels are the same; the PNG around them is written by `serving.receipt`, so its bytes are, too.
"""

from dataclasses import dataclass

import numpy as np
import torch

from diffusion.recipe import Frozen
from diffusion.sampler import run
from diffusion.serving.editing import EditRequest, edit
from diffusion.serving.engine import Engine
from diffusion.serving.given import Given
from diffusion.serving.job import converse, unwatched
from diffusion.serving.receipt import Opened, Receipt, ReworkReceipt, device_name, format_of, pixels_sha256, stamp
from diffusion.serving.request import GenerateRequest, ResolvedRequest, resolve
from diffusion.serving.restoring import RestoreRequest, restoration
from diffusion.store.bundle_spec import BundleSpec


def request_of(receipt: Receipt, spec: BundleSpec) -> ResolvedRequest:
    """The request for the one picture that a receipt is of.  Raises ValueError where this model could not have drawn it."""
    wanted = receipt.model_dump(include={"label", "prompt", "size", "seed", "sampler", "steps", "guidance_kind"})
    nothing = (receipt.label, receipt.prompt) == (None, None) and receipt.guidance_kind == "classifier_free"
    try:
        # where nothing is asked for there is no guidance, and to say so a student would refuse
        return resolve(GenerateRequest(**wanted, guidance=None if nothing else receipt.guidance), spec)
    except ValueError as error:
        raise ValueError(f"the receipt is not of a picture that this model draws: {error}") from error


@torch.no_grad()
def redraw(receipt: Receipt, engine: Engine) -> np.ndarray:
    """The picture of a receipt, drawn with the bundle that it names.  Returns uint8 (H, W, 3).

    Of the request's pictures it is drawn alone: none depends on the others.
    """
    if engine.bundle.digest != receipt.bundle_digest:
        raise ValueError(f"the receipt names the bundle {receipt.bundle_digest[:16]}, not {engine.bundle.digest[:16]}")
    request = request_of(receipt, engine.bundle.spec)
    conversation = converse(request, range(receipt.image, receipt.image + 1), engine.bundle, engine.device)
    return engine.bundle.pictures(run(conversation, engine.denoise)).numpy()[0]


@torch.no_grad()
def remake(receipt: ReworkReceipt, engine: Engine, given: Given, mask: Given | None) -> np.ndarray:
    """The picture of a receipt made again of the given one, and its mask.  Returns uint8 (H, W, 3).  Raises ValueError where
    this model could not have made it, or it was made of others."""
    for what, file, sha256 in (("picture", given, receipt.given_sha256), ("mask", mask, receipt.mask_sha256)):
        if (file and file.sha256) != sha256:
            raise ValueError(f"the receipt is of another {what}: of that with sha256 {sha256}")
    if receipt.mask_hole == "transparent":
        mask = mask.as_hole()
    kind, make = (RestoreRequest, restoration) if receipt.command == "restore" else (EditRequest, edit)
    said = {name: value for name, value in receipt if name in kind.model_fields and value is not None}
    try:
        rework = make(kind(**said, n=receipt.image + 1), given, mask, engine.bundle, engine.device)
    except ValueError as error:
        raise ValueError(f"the receipt is not of a picture that this model makes: {error}") from error
    conversation = rework.job.converse(range(receipt.image, receipt.image + 1), unwatched)
    return engine.bundle.pictures(run(conversation, engine.denoise)).numpy()[0]


class Surroundings(Frozen):
    """What the last bits of a picture may depend on."""

    torch: str
    device: str


def surroundings(device: torch.device) -> Surroundings:
    """Those of this process."""
    return Surroundings(torch=torch.__version__, device=device_name(device))


@dataclass(frozen=True)
class Outcome:
    """What became of a replay."""

    same_bytes: bool  # of the two files
    same_pixels: bool  # of the two pictures
    original: bool  # the pixels drawn are those that the receipt was written for
    largest: int  # difference of two values, 0 to 255
    share: float  # of the values that differ, 0 to 1
    changed: tuple[str, ...]  # in words: in what the surroundings differ

    def words(self) -> str:
        """In a line."""
        if self.same_bytes:
            return "the same bytes"
        if self.same_pixels:
            return "the same pixels, in a file that another program, or another version of a library, has written"
        if self.original:
            return "the picture as it was drawn; the pixels of the file were changed after that"
        why = "; ".join(self.changed) or "the device and torch are those of the receipt, so the program has changed"
        return f"other pixels: {100 * self.share:.2g} % of the values differ, by {self.largest} of 255 at most ({why})"


def outcome(data: bytes, found: Opened, drawn: np.ndarray, here: Surroundings) -> Outcome:
    """Compare the file `data`, opened as `found`, with what was drawn from its receipt, uint8 (H, W, 3)."""
    receipt, picture = found
    if drawn.shape == picture.shape:
        off = np.abs(drawn.astype(np.int16) - picture.astype(np.int16))
        largest, share = int(off.max()), float((off > 0).mean())
    else:  # somebody has cut or resized it
        largest, share = 255, 1.0
    noted = {name: getattr(receipt, name) for name in Surroundings.model_fields}
    return Outcome(
        same_bytes=stamp(drawn, receipt, format_of(data)) == data,
        same_pixels=share == 0,
        original=pixels_sha256(drawn) == receipt.pixels_sha256,
        largest=largest,
        share=share,
        changed=tuple(
            f"{name} was {then}, is {getattr(here, name)}"
            for name, then in noted.items()
            if then not in (None, getattr(here, name))
        ),
    )
