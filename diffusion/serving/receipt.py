"""What made a picture, written into the picture: enough to trace it to its data and to draw the same bytes again."""

import hashlib
import json
from typing import Literal, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from pydantic import Field, model_validator

from diffusion.data.images import decode_all, decode_png, encode_png, encode_webp, is_webp, png_text, webp_text
from diffusion.data.pictures.buckets import shown
from diffusion.recipe import Frozen, GuidanceKind, SamplerName, TaskName, canonical_json, first_mistake, unset, usual
from diffusion.serving.request import ResolvedRequest, once_each
from diffusion.store.averages import Digest
from diffusion.store.bundle_spec import BundleSpec

CHUNK = "diffusion"  # keyword of the text in the file
Format = Literal["png", "webp"]  # of a file with a receipt; both keep every pixel
MAX_TEXT = 2**16  # characters of a receipt


class Receipt(Frozen):
    """Model, lineage, request and pixels of one picture.  The picture is a function of all but `pixels_sha256`."""

    format: Literal[1] = 1
    model: str
    version: str
    bundle_digest: Digest
    run_digest: Digest
    dataset_digest: Digest
    label: str | None
    prompt: str | None = Field(None, exclude_if=unset)
    size: str | None = Field(None, exclude_if=unset)  # WIDTHxHEIGHT, of a model that draws several
    seed: int = Field(ge=0, lt=2**32)
    image: int = Field(ge=0, lt=2**32)  # which of the request's pictures, from 0
    sampler: SamplerName
    steps: int = Field(ge=2, le=1_000)
    guidance: float = Field(ge=0)
    guidance_kind: GuidanceKind = Field("classifier_free", exclude_if=usual("classifier_free"))
    pixels_sha256: Digest  # of the (H, W, 3) uint8 pixels in row order
    # What the last bits of the pixels may depend on, for who draws it again and finds others; absent: not noted
    torch: str | None = Field(None, exclude_if=unset)
    device: str | None = Field(None, exclude_if=unset)


class ReworkReceipt(Frozen):
    """Of a picture that `diffusion restore` or `diffusion edit` made: of which file, with which model, and how.  The picture
    is a function of all but `pixels_sha256`, and of that file's bytes."""

    format: Literal[1] = 1
    command: Literal["restore", "edit"]
    given_sha256: Digest  # of the file of the picture that was given
    mask_sha256: Digest | None  # and of the mask's
    mask_hole: Literal["transparent"] | None = Field(None, exclude_if=unset)  # what is drawn anew, if not what is white
    model: str
    version: str
    bundle_digest: Digest
    run_digest: Digest
    dataset_digest: Digest
    label: str | None
    prompt: str | None
    seed: int = Field(ge=0, lt=2**32)
    image: int = Field(ge=0, lt=64)  # which of the results, from 0
    sampler: SamplerName
    steps: int = Field(ge=2, le=1_000)
    guidance: float = Field(ge=0)
    guidance_kind: GuidanceKind
    # restore
    task: TaskName | None = Field(None, exclude_if=unset)
    way: Literal["trained", "zero-shot"] | None = Field(None, exclude_if=unset)
    factor: int | None = Field(None, exclude_if=unset)
    noise: float | None = Field(None, exclude_if=unset)
    repeats: int | None = Field(None, le=100, exclude_if=unset)
    # edit
    strength: float | None = Field(None, exclude_if=unset)
    coarse: int | None = Field(None, exclude_if=unset)
    from_label: str | None = Field(None, exclude_if=unset)
    from_prompt: str | None = Field(None, exclude_if=unset)
    pixels_sha256: Digest
    torch: str
    device: str

    @model_validator(mode="after")
    def _checks(self) -> "ReworkReceipt":
        needed = {"restore": ("task", "way"), "edit": ("strength",)}[self.command]
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"{missing[0]} is missing, and {self.command} has one")
        return self


AnyReceipt = Receipt | ReworkReceipt
_KINDS: dict[str, type[Receipt] | type[ReworkReceipt]] = {  # by the keyword of the text chunk
    CHUNK: Receipt,
    f"{CHUNK}-restore": ReworkReceipt,
    f"{CHUNK}-edit": ReworkReceipt,
}


class Opened(NamedTuple):
    """A picture with a receipt: what that says, and the pixels there are, uint8 (H, W, 3)."""

    receipt: AnyReceipt
    picture: np.ndarray

    @property
    def intact(self) -> bool:
        """Whether the pixels are those the receipt was written for."""
        return pixels_sha256(self.picture) == self.receipt.pixels_sha256


def device_name(device: torch.device) -> str:
    """The kind of device, as receipts name it: a GPU's model, or "cpu" and its vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


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
    device: torch.device | None = None,
) -> Receipt:
    """The receipt of picture number `image` of a request, drawn with that bundle.  picture: uint8 (H, W, 3); device: on
    which it was drawn, where that is to be noted.
    """
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
        torch=device and torch.__version__,
        device=device and device_name(device),
    )


def format_of(data: bytes) -> Format:
    """Of a file with a receipt."""
    return "webp" if is_webp(data) else "png"


def encoded(picture: np.ndarray, format: Format, text: dict[str, str] | None = None) -> bytes:
    """uint8 (H, W, 3) as a file of exactly these pixels with that text, the same bytes for the same input; a WebP's are
    of the version of libwebp, too."""
    return {"png": encode_png, "webp": encode_webp}[format](picture, text)


def stamp(picture: np.ndarray, receipt: AnyReceipt, format: Format = "png") -> bytes:
    """The picture as a file with its receipt inside.  Equal pictures and receipts give equal bytes."""
    kind = f"{CHUNK}-{receipt.command}" if isinstance(receipt, ReworkReceipt) else CHUNK
    return encoded(picture, format, {kind: canonical_json(receipt).decode()})


def headers(receipt: Receipt) -> dict[str, str]:
    """The receipt as response headers, ASCII only: text is percent-encoded."""
    fields = receipt.model_dump(mode="json", exclude={"format", "torch", "device"}, exclude_none=True)
    return {f"X-Diffusion-{name.replace('_', '-').title()}": quote(str(value)) for name, value in fields.items()}


def read_receipt(data: bytes) -> AnyReceipt:
    """The receipt inside a PNG or WebP.  Raises ValueError if there is none or the pixels are not those it was written
    for."""
    found = opened(data)
    if not found.intact:
        raise ValueError(
            f"the pixels have sha256 {pixels_sha256(found.picture)[:12]}, the receipt says"
            f" {found.receipt.pixels_sha256[:12]}: the picture was changed after it was drawn"
        )
    return found.receipt


def opened(data: bytes) -> Opened:
    """The receipt inside a PNG or WebP, which anybody may have written, and the pixels, which may be others.

    Raises ValueError where there is none, or it is not one: too long, not JSON, a name twice, a wrong type or value.
    """
    name = {"png": "PNG", "webp": "WebP"}[format_of(data)]
    text = webp_text(data) if name == "WebP" else png_text(data)
    found = [kind for kind in _KINDS if kind in text]
    if len(found) != 1:
        none = f"no text {CHUNK!r}: it was not drawn here, or a program stripped it"
        raise ValueError(f"this {name} has {'several receipts: one is not its own' if found else none}")
    (kind,) = found
    if len(text[kind]) > MAX_TEXT:
        raise ValueError(f"the {name}'s text {kind!r} has more than {MAX_TEXT:,} characters: no receipt has")
    try:
        receipt = _KINDS[kind].model_validate(json.loads(text[kind], object_pairs_hook=once_each), strict=True)
        if isinstance(receipt, ReworkReceipt) and kind != f"{CHUNK}-{receipt.command}":
            raise ValueError(f"it is of the command {receipt.command}")
    except (ValueError, RecursionError) as error:
        why = first_mistake(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise ValueError(f"the {name}'s text {kind!r} is not a receipt of format 1: {why}") from error
    return Opened(receipt, decode_png(data) if name == "PNG" else np.ascontiguousarray(decode_all(data)[..., :3]))
