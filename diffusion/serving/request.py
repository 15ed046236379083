"""What a client may ask for, and what that becomes once the model's defaults and the server's limits are applied."""

import difflib
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, AliasChoices, Field, ValidationError
from pydantic_core import PydanticCustomError

from diffusion.data.pictures.buckets import Size, shown
from diffusion.recipe import Frozen, GuidanceKind, SamplerName, ServeRecipe, mistake
from diffusion.spacing import sampling_sigmas
from diffusion.store.bundle_spec import BundleSpec

Whole = Annotated[int, Field(strict=True)]  # true is not 1, "3" is not 3
Model = TypeVar("Model", bound=Frozen)
MAX_PROMPT = 300  # characters
JOINERS = "\u200c\u200d"  # invisible, but part of how Persian and Hindi are spelt, and of emoji of several parts


def _caption(text: str) -> str:
    seen = text.translate(dict.fromkeys(map(ord, JOINERS)))
    if not seen.strip():
        raise PydanticCustomError("empty_prompt", "a prompt has words; null draws without one")
    if not seen.isprintable():
        unprintable = next(repr(letter) for letter in seen if not letter.isprintable())
        raise PydanticCustomError(
            "unprintable_prompt", f"a prompt is one line of printable characters, without {unprintable}"
        )
    return text


Prompt = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_caption)]


def prompt_of(caption: str) -> str | None:
    """A caption of somebody's data as a prompt: one line of at most MAX_PROMPT characters, None where it has no words."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in caption).split())
    return line[:MAX_PROMPT].rstrip() or None


class RequestError(ValueError):
    """A request that cannot be served as asked.  `param` is the field, `allowed` the values it may have (a list, or
    {"minimum": ..., "maximum": ...}), both JSON values or None; the message says all of it in words."""

    def __init__(self, message: str, *, param: str | None = None, allowed: list | dict | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.allowed = allowed


class Asked(Frozen):
    """What every request for pictures may say.  What is left out, the model's own sampling recipe decides."""

    label: str | None = Field(
        None,
        validation_alias=AliasChoices("label", "class"),
        description="Class name; null draws without a class",
    )
    prompt: Prompt | None = Field(
        None, description="What the picture shows, in words, where the model reads them; null draws without"
    )
    n: Whole = Field(1, ge=1, description="Number of pictures")
    seed: Whole | None = Field(None, ge=0, lt=2**32, description="Picture i depends on the seed and i; null: drawn")
    sampler: SamplerName | None = Field(None, description="How the equation is solved; null: the model's own")
    steps: Whole | None = Field(None, ge=2, le=1_000, description="Noise levels visited; null: the model's own")
    guidance: Annotated[float, Field(strict=True)] | None = Field(
        None, ge=0, le=20, description="1 is none, more is more typical of class and prompt; null: the model's own"
    )
    guidance_kind: GuidanceKind | None = Field(
        None,
        description="Away from what: the answer without class and prompt, or a worse model's; null: the model's own",
    )


class GenerateRequest(Asked):
    """Pictures wanted, of nothing but this."""

    size: str | None = Field(
        None, max_length=20, description="WIDTHxHEIGHT in pixels, one of the model's sizes; null: the squarest of them"
    )


class ResolvedRequest(Frozen):
    """A request with nothing left open: together with the bundle's digest it determines every byte of its pictures."""

    label: str | None
    label_index: int = Field(ge=0, description="The class, or the number of classes for none")
    prompt: str | None
    n: int = Field(ge=1)
    size: Size | None = Field(None, description="(height, width); none: the model has one size, its square")
    seed: int = Field(ge=0, lt=2**32)
    sampler: SamplerName
    steps: int = Field(ge=2)
    guidance: float = Field(ge=0)
    guidance_kind: GuidanceKind

    @property
    def guided(self) -> bool:
        """Whether a picture asks for two answers, what it wants and what it is led away from: two rows instead of one."""
        nothing = (self.label, self.prompt) == (None, None)
        return self.guidance != 1 and not (nothing and self.guidance_kind == "classifier_free")


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ, for `object_pairs_hook`.  Raises RequestError: of two values of one name parsers
    take the first or the last, so what was meant cannot be known."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError(f"{_shown(name)} is given twice: give it once", param=_printable(name))
        found[name] = value
    return found


def parse(model: type[Model], data: Mapping[str, Any], limits: ServeRecipe | None = None) -> Model:
    """`data` as a value of `model`.  Raises RequestError naming the first wrong field, its value and what is allowed.

    limits: the endpoint's, which `resolve` will hold the value to; here they are only told.
    """
    try:
        return model.model_validate({name: _integral(value) for name, value in data.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    # a name that is no text, half a character, has no place in the model either
    name = _printable(str(first["loc"][0] if first["loc"] else first["input"]))
    if first["type"] == "extra_forbidden" or not first["loc"]:
        if name == "class":
            raise RequestError("label and class are two names of one field: give one of them", param="class")
        fields = [_public_name(model, field) for field in model.model_fields]
        raise RequestError(
            f"unknown field {_shown(name)}{_did_you_mean(name, fields)}; the fields are {', '.join(fields)}",
            param=name,
            allowed=fields,
        )
    allowed = _allowed(model, name, limits)
    told = f"; allowed: {_in_words(allowed)}" if allowed else ""
    # of a field that is missing the input is all the others
    said = f"{name} is missing" if first["type"] == "missing" else f"{name}={_shown(first['input'])}: {mistake(first)}"
    raise RequestError(f"{said}{told}", param=name, allowed=allowed)


def _integral(value: object) -> object:
    """1.0 is 1: JSON has one kind of number, and JSON Schema's integers are those without a fraction."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if whole else value


def resolve(request: GenerateRequest, spec: BundleSpec, limits: ServeRecipe | None = None) -> ResolvedRequest:
    """Fill in the model's defaults and check what only the model and the server know: classes and limits.

    limits: the endpoint's; None where the caller is the pipeline itself.  A missing seed is drawn here, so that the
    answer can state it.  Raises RequestError.
    """
    if request.label is not None and request.label not in spec.classes:
        raise RequestError(
            f"label={_shown(request.label)} is not a class of this model{_did_you_mean(request.label, spec.classes)};"
            f" its classes are {', '.join(spec.classes)}",
            param="label",
            allowed=list(spec.classes),
        )
    if request.prompt is not None and spec.text is None:
        raise RequestError(
            f"prompt={_shown(request.prompt)}: this model reads no prompts, since it was trained without captions; leave"
            f" prompt out, and give a label to choose a class",
            param="prompt",
            allowed=[None],
        )
    kind = request.guidance_kind or spec.sampling.guidance_kind
    if kind not in spec.guidance_kinds:
        raise RequestError(
            f"guidance_kind={kind}: this model has no worse model beside it to be guided away from, as one evaluated with"
            f" evaluate.guide_images has; leave guidance_kind out",
            param="guidance_kind",
            allowed=list(spec.guidance_kinds),
        )
    # both of autoguidance's models are asked for the same, be it nothing
    nothing = request.label is None and request.prompt is None and kind == "classifier_free"
    if nothing and request.guidance not in (None, 1):
        kinds = "a class" if spec.text is None else "a class or a prompt"
        raise RequestError(
            f"guidance={request.guidance}: guidance strengthens {kinds}, and no label is given."
            f" Give {kinds.replace('class', 'label')}, or leave guidance out",
            param="guidance",
            allowed=[None, 1],
        )
    if spec.lesson:
        _check_student(request, spec)
    size = _size(request.size, spec)
    steps = request.steps or spec.sampling.steps
    if limits is not None:
        for name, value in (("n", request.n), ("steps", steps)):
            if value > _limit(name, limits):
                allowed = _allowed(type(request), name, limits)
                raise RequestError(
                    f"{name}={value}: this server allows {_in_words(allowed)}", param=name, allowed=allowed
                )
    try:
        sampling_sigmas(spec.sampling, steps)
    except ValueError as error:
        raise RequestError(str(error), param="steps") from error
    guidance = spec.sampling.guidance if request.guidance is None else request.guidance
    return ResolvedRequest(
        label=request.label,
        label_index=len(spec.classes) if request.label is None else spec.classes.index(request.label),
        prompt=request.prompt,
        n=request.n,
        size=size if spec.sizes else None,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        sampler=request.sampler or spec.sampling.sampler,
        steps=steps,
        guidance=1.0 if nothing else guidance,
        guidance_kind=kind,
    )


def _check_student(request: GenerateRequest, spec: BundleSpec) -> None:
    """A student answers at the noise levels it was taught for, with its teacher's guidance in its answers, and for no other
    way of drawing: what it would draw then is not what its report is of."""
    own = spec.sampling
    for name in ("sampler", "steps", "guidance"):
        asked, taught = getattr(request, name), getattr(own, name)
        if asked not in (None, taught):
            raise RequestError(
                f"{name}={_shown(asked)}: this model is a few-step student, which draws with {name}={taught} alone; leave"
                f" {name} out, or ask its teacher",
                param=name,
                allowed=[None, taught],
            )


def _size(asked: str | None, spec: BundleSpec) -> Size:
    """(height, width) of the pictures of a request."""
    sizes = spec.sizes or (spec.size,)
    if asked is None:
        return spec.size
    known = {shown(size): size for size in sizes}
    if asked.lower() not in known:
        raise RequestError(
            f"size={_shown(asked)}: the sizes of this model, width x height, are {', '.join(known)}",
            param="size",
            allowed=list(known),
        )
    return known[asked.lower()]


def _limit(name: str, limits: ServeRecipe) -> int | None:
    """The endpoint's own maximum of a field, if it has one."""
    return {"n": limits.max_n, "steps": limits.max_steps}.get(name)


def _public_name(model: type[Frozen], field: str) -> str:
    alias = model.model_fields[field].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else field


def _allowed(model: type[Frozen], name: str | None, limits: ServeRecipe | None) -> list | dict | None:
    """What the JSON schema of `model` says of a field: its list of values, or its bounds, within the endpoint's."""
    schema = model.model_json_schema()["properties"].get(name, {})
    branches = [branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null"]
    for branch in branches:
        if "enum" in branch:
            return branch["enum"]
        bounds = {key: branch[key] for key in ("minimum", "maximum") if key in branch}
        if "exclusiveMinimum" in branch:
            bounds["above"] = branch["exclusiveMinimum"]
        if "exclusiveMaximum" in branch:
            bounds["maximum"] = branch["exclusiveMaximum"] - 1
        maximum = _limit(name, limits) if limits else None
        if maximum is not None:
            bounds["maximum"] = min(maximum, bounds.get("maximum", maximum))
        if bounds:
            return bounds
    return None


def _in_words(allowed: list | dict) -> str:
    if isinstance(allowed, list):
        return ", ".join(map(str, allowed))
    if "maximum" in allowed:
        if "above" in allowed:
            return f"above {allowed['above']} and up to {allowed['maximum']}"
        return f"{allowed['minimum']} to {allowed['maximum']}"
    return f"{allowed['minimum']} or more"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _printable(text: str) -> str:
    """Short, and without the half characters that JSON may hold and UTF-8 cannot."""
    return text[:80].encode(errors="replace").decode()


def _did_you_mean(name: str, names: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(name[:80], names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
