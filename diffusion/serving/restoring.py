"""Restoration as the endpoint and the command do it: a picture from a part of it - small, masked or grey - with a model
trained for that, or for none of these."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from diffusion.data.pictures.buckets import Size
from diffusion.degradation import FACTORS, beside
from diffusion.operators import BlockMean, Composition, Grey, LinearOperator, Mask
from diffusion.recipe import ServeRecipe, TaskName
from diffusion.restore import REPEATS, TRAINED_STEPS, null_space, residual, zero_shot
from diffusion.sampler import SAMPLERS, Conversation
from diffusion.serving.given import Given, at_size, check_mask, fit_note, has_pixels, keep_of, size_for
from diffusion.serving.job import Watch, under, unwatched
from diffusion.serving.request import Asked, RequestError, ResolvedRequest, Whole
from diffusion.serving.rework import Converse, Rework, job_of, levels, refuse_student, resolved, start_of
from diffusion.store.bundle import Bundle
from diffusion.store.bundle_spec import BundleSpec

TASKS = get_args(TaskName)
Way = Literal["trained", "zero-shot"]


class RestoreRequest(Asked):
    """A picture to be restored."""

    task: TaskName = Field(description="What is to be found again: detail, what is masked, or colour")
    way: Way | None = Field(None, description="null: trained, where the model was trained for the task")
    factor: Whole | None = Field(
        None,
        description=f"By which the picture is to grow, one of {FACTORS}: super-resolution's, colorization may have one",
    )
    noise: Annotated[float, Field(strict=True)] = Field(
        0.0, ge=0, le=2, description="Zero-shot: standard deviation of the picture's own noise; white - black is 2"
    )
    repeats: Whole | None = Field(
        None, ge=1, le=100, description=f"Zero-shot: how often each stretch of the way is gone; null: {REPEATS}"
    )


def restoration(
    asked: RestoreRequest,
    given: Given,
    mask: Given | None,
    bundle: Bundle,
    device: torch.device,
    limits: ServeRecipe | None = None,
) -> Rework:
    """What an engine with this bundle draws.  mask: inpainting's, white where something is missing.  Raises RequestError."""
    spec = bundle.spec
    request = check_restoration(asked, given, mask, spec, limits)
    trained = _trained(asked, spec)
    found = measured(asked, given.image, mask and mask.image, size_for(given.image, spec), device)
    repeats = asked.repeats or REPEATS
    if trained:
        converse = by_training(request, found.operator, found.y, bundle, device)
    else:
        converse = by_zero_shot(request, found.operator, found.y, bundle, device, noise=asked.noise, repeats=repeats)
    facts: dict[str, object] = {"command": "restore", "task": asked.task, "factor": asked.factor}
    facts |= {"given_sha256": given.sha256, "mask_sha256": mask and mask.sha256, "mask_hole": mask and mask.hole}
    facts |= {"way": "trained"} if trained else {"way": "zero-shot", "noise": asked.noise, "repeats": repeats}
    operator, y = found.operator, found.y
    exact = None if trained or asked.noise else lambda x0: operator.pinv(y) + x0 - operator.pinv(operator.forward(x0))
    job = job_of(request, converse, lambda x0: residual(operator, x0, y), exact)
    return Rework(job, found.before, facts, found.notes)


def by_zero_shot(
    request: ResolvedRequest,
    operator: LinearOperator,
    y: Tensor,
    bundle: Bundle,
    device: torch.device,
    *,
    noise: float,
    repeats: int,
) -> Converse:
    """The way of a model that only draws."""

    def converse(images: range, watch: Watch = unwatched) -> Conversation:
        sigmas = levels(request, bundle)
        initial, fresh = start_of(request, images, bundle, device)
        x = initial * sigmas[0].float()
        way = zero_shot(x, sigmas, fresh, operator, y, sigma_y=noise, repeats=repeats)
        return under(watch(way), request, len(images), bundle, device)

    return converse


def by_training(
    request: ResolvedRequest, operator: LinearOperator, y: Tensor, bundle: Bundle, device: torch.device
) -> Converse:
    """The way of a model that was shown such measurements: its own sampler, and y put into every answer exactly."""

    def converse(images: range, watch: Watch = unwatched) -> Conversation:
        sigmas = levels(request, bundle)
        initial, fresh = start_of(request, images, bundle, device)
        inner = SAMPLERS[request.sampler](initial * sigmas[0].float(), sigmas, fresh)
        seen = beside(operator, operator.pinv(y))
        return under(null_space(watch(inner), operator, y), request, len(images), bundle, device, image=seen)

    return converse


@dataclass(frozen=True, eq=False)
class Measurement:
    """What is known of a picture: y = A x0."""

    operator: LinearOperator
    y: Tensor
    before: Tensor  # (1, 3, H, W): that as a picture to look at
    notes: tuple[str, ...]


def measured(
    asked: RestoreRequest, image: Image.Image, mask: Image.Image | None, size: Size, device: torch.device
) -> Measurement:
    """What the task knows of a picture at `size`, which was checked."""
    note, factor = fit_note(image, size), asked.factor
    if asked.task == "inpainting":
        window = Mask(keep_of(mask, size))
        y = window.forward(at_size(image, size, device))
        return Measurement(window, y, window.pinv(y), note)
    if factor is None:
        y = Grey().forward(at_size(image, size, device))
        return Measurement(Grey(), y, y.expand(1, 3, *size), note)
    blocks, below = BlockMean(factor), (size[0] // factor, size[1] // factor)
    if has_pixels(image, size, 1):
        small = blocks.forward(at_size(image, size, device))
        note += (f"made small: the means of {factor} x {factor} pixels are used",)
    else:
        small, note = at_size(image, below, device), fit_note(image, below)
    if asked.task == "super-resolution":
        return Measurement(blocks, small, blocks.pinv(small), note)
    y = Grey().forward(small)
    return Measurement(Composition(blocks, Grey()), y, blocks.pinv(y).expand(1, 3, *size), note)


def check_restoration(
    asked: RestoreRequest, given: Given, mask: Given | None, spec: BundleSpec, limits: ServeRecipe | None = None
) -> ResolvedRequest:
    """All that can be said without the weights.  Returns the request with nothing left open.  Raises RequestError."""
    refuse_student(spec, "restoration")
    if spec.codec:
        raise RequestError(
            "this model draws latents, and restoration puts what is known of the pixels into every answer: ask a model that"
            " draws pixels"
        )
    _check_task(asked, mask)
    _check_way(asked, spec)
    changed: dict[str, object] = {}
    if asked.guidance is None and (asked.label, asked.prompt) != (None, None):
        changed["guidance"] = 1.0  # not the model's own, which is for drawing freely
    if asked.steps is None and _trained(asked, spec):
        changed["steps"] = TRAINED_STEPS
    request = resolved(asked, given, spec, limits, **changed)
    size = size_for(given.image, spec)
    if mask is not None:
        check_mask(mask.image, given.image)
        if not keep_of(mask.image, size).any():
            raise RequestError(
                "the mask is white everywhere: nothing of the picture is kept, so ask for a picture drawn freely",
                param="mask",
            )
    if asked.factor is not None and not has_pixels(given.image, size, asked.factor):
        fitting = [factor for factor in FACTORS if has_pixels(given.image, size, factor)]
        least = f"it needs a picture of at least {size[1] // max(FACTORS)} x {size[0] // max(FACTORS)}"
        raise RequestError(
            f"factor={asked.factor}: the picture is {given.image.width} x {given.image.height}, the model draws {size[1]} x"
            f" {size[0]}: {'give ' + _or(fitting) if fitting else least}",
            param="factor",
            allowed=fitting or None,
        )
    _check_length(asked, request, spec, limits)
    return request


def _check_task(asked: RestoreRequest, mask: Given | None) -> None:
    task, factor = asked.task, asked.factor
    if task == "inpainting" and factor is not None:
        raise RequestError(
            f"factor={factor}: {task} takes none, it is for super-resolution and colorization",
            param="factor",
            allowed=[None],
        )
    if factor not in (None, *FACTORS):
        raise RequestError(f"factor={factor}: give {_or(FACTORS)}", param="factor", allowed=list(FACTORS))
    if task == "super-resolution" and factor is None:
        raise RequestError(
            f"factor is missing: {task} takes one, {_or(FACTORS)}", param="factor", allowed=list(FACTORS)
        )
    if task == "inpainting" and mask is None:
        raise RequestError(
            f"mask is missing: {task} takes a picture of the same size, white where something is missing", param="mask"
        )
    if task != "inpainting" and mask is not None:
        raise RequestError(f"mask: {task} takes none, it is for inpainting", param="mask", allowed=[None])


def _check_way(asked: RestoreRequest, spec: BundleSpec) -> None:
    if asked.way != "trained":
        return
    if asked.noise:
        raise RequestError(
            f"noise={asked.noise:g} with way=trained: it has learned from measurements without noise. Give way=zero-shot",
            param="noise",
            allowed=[0],
        )
    if asked.repeats is not None:
        raise RequestError(
            f"repeats={asked.repeats} with way=trained: that way is gone once. Give way=zero-shot, or steps",
            param="repeats",
            allowed=[None],
        )
    if _learning(asked) not in spec.degradations:
        learned = ", ".join(spec.degradations) or "no restoration"
        raise RequestError(
            f"way=trained: this model was trained for {learned}, not for {_learning(asked)}. Leave way out, or train a model"
            f" for it, `diffusion run --preset restorer`, and ask that",
            param="way",
            allowed=[None, "zero-shot"],
        )


def _check_length(
    asked: RestoreRequest, request: ResolvedRequest, spec: BundleSpec, limits: ServeRecipe | None
) -> None:
    """A stretch that is gone often is as long as many steps."""
    if limits is None or _trained(asked, spec):
        return
    most = max(1, REPEATS * limits.max_steps // request.steps)
    if (asked.repeats or REPEATS) > most:
        raise RequestError(
            f"repeats={asked.repeats or REPEATS}: with steps={request.steps} this server allows 1 to {most}",
            param="repeats",
            allowed={"minimum": 1, "maximum": most},
        )


def _trained(asked: RestoreRequest, spec: BundleSpec) -> bool:
    """Whether to go the trained way."""
    plain = not asked.noise and asked.repeats is None
    return asked.way == "trained" or (asked.way is None and plain and _learning(asked) in spec.degradations)


def _learning(asked: RestoreRequest) -> str:
    """What a model must have learned for the trained way."""
    return f"{asked.task} of a small picture" if asked.task == "colorization" and asked.factor else asked.task


def _or(factors: list[int] | tuple[int, ...]) -> str:
    return "factor " + " or ".join(map(str, factors))
