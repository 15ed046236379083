"""What requests say beside what is to be drawn: which model, and how the answer is wanted."""

from typing import Annotated, Literal, NamedTuple, get_args

from fastapi import Request
from pydantic import Field, field_validator

from diffusion.recipe import Frozen
from diffusion.serving.editing import EditRequest
from diffusion.serving.priority import PRIORITIES, Priority
from diffusion.serving.receipt import Format
from diffusion.serving.request import GenerateRequest, RequestError, Whole
from diffusion.serving.restoring import RestoreRequest

MAX_PREVIEWS = 3  # as OpenAI has it


class Wanted(Frozen):
    """Of every request.  `user`, `quality` and `background` are OpenAI's, and change nothing."""

    model: str | None = Field(
        None,
        description="NAME or NAME@VERSION, as GET /v1/models lists them; null: the first, or its canary by its share",
    )
    response_format: Literal["b64_json", "png"] | None = Field(
        None, description="JSON with pictures in base64, or one bare PNG; null: what the Accept header prefers"
    )
    output_format: Format | None = Field(
        None,
        description="Of the pictures; both keep every pixel, a WebP is smaller; null: a bare picture's own, or png",
    )
    output_compression: Whole | None = Field(
        None, ge=0, le=100, description="OpenAI's quality of a WebP; 100 alone, since every pixel is kept"
    )
    stream: Annotated[bool, Field(strict=True)] = Field(
        False, description="Server-sent events: previews, then pictures"
    )
    partial_images: Whole | None = Field(
        None, ge=0, le=MAX_PREVIEWS, description="Previews of each picture in the stream; null: none"
    )
    priority: Priority | None = Field(
        None, description="Whose turn it is sooner; at most the key's own, which null is, and without keys normal"
    )
    timeout: Annotated[float, Field(strict=True)] | None = Field(
        None, gt=0, le=3600, description="Seconds that it may take; refused at once where it would take more"
    )
    user: str | None = Field(None, max_length=200, description="Whom the caller draws for; not looked at")
    quality: Literal["auto", "standard"] | None = Field(None, description="There is one")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures have no transparency")

    def urgency(self, most: Priority) -> Priority:
        """most: the key's.  Raises RequestError for more than that."""
        allowed = PRIORITIES[PRIORITIES.index(most) :]
        if self.priority not in (None, *allowed):
            raise RequestError(
                f"priority={self.priority}: who asks so may ask for {' or '.join(allowed)}; `diffusion keys add NAME"
                f" --priority {self.priority}` makes a key that may",
                param="priority",
                allowed=list(allowed),
            )
        return self.priority or most

    def check(self) -> None:
        """Raises RequestError for what contradicts itself."""
        if self.output_compression not in (None, 100):
            raise RequestError(
                f"output_compression={self.output_compression}: pictures are compressed without loss, since a receipt is of"
                f" their exact pixels. Leave it out; output_format=webp is the smaller",
                param="output_compression",
                allowed=[None, 100],
            )
        if self.response_format == "png" and self.output_format == "webp":
            raise RequestError(
                "response_format=png with output_format=webp: one bare picture has one format. For a bare WebP leave"
                " response_format out and send 'Accept: image/webp'",
                param="output_format",
                allowed=[None, "png"],
            )
        if self.stream and self.response_format == "png":
            raise RequestError(
                "response_format=png: a stream of events holds pictures in base64. Leave it out, or stream",
                param="response_format",
                allowed=[None, "b64_json"],
            )
        if self.partial_images is not None and not self.stream:
            raise RequestError(
                f"partial_images={self.partial_images}: they come in a stream; give stream=true, or leave it out",
                param="partial_images",
                allowed=[None],
            )


class Manner(NamedTuple):
    """Of an answer: what its pictures are, and whether it is one of them and nothing else."""

    format: Format
    bare: bool


def manner_of(wanted: Wanted, n: int, request: Request) -> Manner:
    """Raises RequestError where one bare picture is asked for and there are several, or it is to be two things."""
    accept, said = request.headers.get("accept", ""), wanted.output_format
    taken: list[Format] = ["png"] if wanted.response_format == "png" else []  # the preferred first
    if wanted.response_format is None:
        taken = [format for format in get_args(Format) if accept.startswith((f"image/{format}", "image/*"))]
    if not taken:
        return Manner(said or "png", bare=False)
    if said not in (None, *taken):
        raise RequestError(
            f"output_format={said}, and Accept is {accept[:80]!r}: one bare picture has one format",
            param="output_format",
            allowed=[None, *taken],
        )
    if n > 1:
        raise RequestError(
            f"n={n}: a bare picture is one. Ask for response_format=b64_json (and JSON in Accept), or n=1",
            param="n",
            allowed=[1],
        )
    return Manner(said or taken[0], bare=True)


class GenerationBody(GenerateRequest, Wanted):
    """The body of POST /v1/images/generations.  size=auto is OpenAI's null."""

    @field_validator("size", mode="before")
    @classmethod
    def _of_any_size(cls, value: object) -> object:
        return None if value == "auto" else value


class RestorationBody(RestoreRequest, Wanted):
    """The fields of POST /v1/images/restorations, beside the files `image` and, of inpainting, `mask`."""


class EditBody(EditRequest, Wanted):
    """The fields of POST /v1/images/edits and /v1/images/variations, beside the file `image` and, of edits, `mask`.

    `size` is OpenAI's: the picture's own shape decides.
    """

    strength: Annotated[float, Field(strict=True)] | None = Field(
        None, gt=0, le=1, description="Share of the steps that are gone: little near 0, at 1 nothing stays; null: 0.6"
    )
    size: Literal["auto"] | None = Field(
        None, description="Of the model's sizes the one nearest to the picture's shape"
    )
