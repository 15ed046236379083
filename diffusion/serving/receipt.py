"""What made a picture, written into the picture: enough to trace it to its data and to draw the same bytes again."""

import hashlib
import json
from typing import Literal
from urllib.parse import quote

import numpy as np
from pydantic import Field

from diffusion.data.images import decode_png, encode_png, png_text
from diffusion.data.pictures.buckets import shown
from diffusion.recipe import Frozen, GuidanceKind, SamplerName, canonical_json, first_mistake, unset, usual
from diffusion.serving.request import ResolvedRequest
from diffusion.store.bundle import BundleSpec

CHUNK = "diffusion"  # keyword of the PNG text chunk


class Receipt(Frozen):
    """Model, lineage, request and pixels of one picture.  The picture is a function of all but `pixels_sha256`."""

    format: Literal[1] = 1
    model: str
    version: str
    bundle_digest: str
    run_digest: str
    dataset_digest: str
    label: str | None
    prompt: str | None = Field(None, exclude_if=unset)
    size: str | None = Field(None, exclude_if=unset)  # WIDTHxHEIGHT, of a model that draws several
    seed: int
    image: int  # which of the request's pictures, from 0
    sampler: SamplerName
    steps: int
    guidance: float
    guidance_kind: GuidanceKind = Field("classifier_free", exclude_if=usual("classifier_free"))
    pixels_sha256: str  # of the (H, W, 3) uint8 pixels in row order


def pixels_sha256(picture: np.ndarray) -> str:
    """sha256 (hex) of uint8 (H, W, 3) pixels in row order."""
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).hexdigest()


def receipt_of(
    picture: np.ndarray,
    image: int,
    request: ResolvedRequest,
    spec: BundleSpec,
    *,
    bundle_digest: str,
    model: str,
    version: str,
) -> Receipt:
    """The receipt of picture number `image` of a request, drawn with that bundle.  picture: uint8 (H, W, 3)."""
    return Receipt(
        model=model,
        version=version,
        bundle_digest=bundle_digest,
        run_digest=spec.run_digest,
        dataset_digest=spec.dataset_digest,
        label=request.label,
        prompt=request.prompt,
        size=request.size and shown(request.size),
        seed=request.seed,
        image=image,
        sampler=request.sampler,
        steps=request.steps,
        guidance=request.guidance,
        guidance_kind=request.guidance_kind,
        pixels_sha256=pixels_sha256(picture),
    )


def stamp(picture: np.ndarray, receipt: Receipt) -> bytes:
    """The picture as PNG with its receipt inside.  Equal pictures and receipts give equal bytes."""
    return encode_png(picture, {CHUNK: canonical_json(receipt).decode()})


def headers(receipt: Receipt) -> dict[str, str]:
    """The receipt as response headers, ASCII only: text is percent-encoded."""
    fields = receipt.model_dump(mode="json", exclude={"format"}, exclude_none=True)
    return {f"X-Diffusion-{name.replace('_', '-').title()}": quote(str(value)) for name, value in fields.items()}


def read_receipt(png: bytes) -> Receipt:
    """The receipt inside a PNG.  Raises ValueError if there is none or the pixels are not those it was written for."""
    text = png_text(png)
    if CHUNK not in text:
        raise ValueError(f"this PNG has no text chunk {CHUNK!r}: it was not drawn here, or a program stripped it")
    try:
        receipt = Receipt.model_validate(json.loads(text[CHUNK]))
    except ValueError as error:
        raise ValueError(
            f"the PNG's text chunk {CHUNK!r} is not a receipt of format 1: {first_mistake(error)}"
        ) from error
    actual = pixels_sha256(decode_png(png))
    if actual != receipt.pixels_sha256:
        raise ValueError(
            f"the pixels have sha256 {actual[:12]}, the receipt says {receipt.pixels_sha256[:12]}: the picture was"
            f" changed after it was drawn"
        )
    return receipt
