"""restore: a picture from a part of it - small, masked or grey - with a model trained for that, or for none of these."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from PIL import Image
from torch import Tensor

from diffusion.data.pictures.buckets import Size
from diffusion.data.pictures.fit import cropped
from diffusion.degradation import FACTORS, beside
from diffusion.operators import BlockMean, Composition, Grey, LinearOperator, Mask
from diffusion.random import Stream
from diffusion.recipe import TaskName
from diffusion.restore import REPEATS, TRAINED_STEPS, null_space, residual
from diffusion.restore import zero_shot as by_zero_shot
from diffusion.sampler import SAMPLERS, Conversation
from diffusion.serving.request import ResolvedRequest, resolve
from diffusion.store.bundle_spec import BundleSpec
from flows.console import say
from flows.pictures import (
    Model,
    answered,
    fitted,
    folder,
    given_files,
    in_model,
    mask_image,
    mask_of,
    open_model,
    parsed,
    read,
    refuse_student,
    settled,
    size_for,
    written,
)
from flows.site import Site

TASKS = get_args(TaskName)
WAYS = ("trained", "zero-shot")


def restore(
    site: Site,
    name: str,
    which: str,
    picture: Path,
    *,
    task: str,
    bundle: Path | None = None,
    way: str | None = None,
    factor: int | None = None,
    mask: Path | None = None,
    noise: float = 0.0,
    repeats: int | None = None,
    out: Path | None = None,
    options: dict[str, object],
) -> Path:
    """Restore the picture `options["n"]` times into `out`, beside a strip input | results.  Returns the folder.

    task: one of TASKS.  way: one of WAYS, None for the trained one where the model has it.  factor: one of FACTORS, by
    which the picture is to grow: super-resolution has one, colorization may.  mask: inpainting's, white where something is
    missing.  noise: standard deviation of the picture's own noise, black being -1 and white 1.  repeats: how often each
    stretch of the way is gone; None for REPEATS.  Noise and repeats are zero-shot's alone.  options: fields of a
    GenerateRequest, None for the model's own.  Raises ValueError.
    """
    _check(task, factor, mask, noise, repeats)
    _check_way(way, noise, repeats)
    target = folder(site, out, "restored", picture.stem)
    asked, image = parsed(**options), read(picture)
    hole = None if mask is None else mask_image(mask, image)
    learning = f"{task} of a small picture" if task == "colorization" and factor else task

    def check(name: str, spec: BundleSpec) -> None:
        refuse_student(name, spec, "restoration")
        if spec.codec:
            raise ValueError(
                f"{name} draws latents, and restoration puts what is known of the pixels into every answer: give a model"
                f" that draws pixels, with --name or --bundle"
            )
        resolve(asked, spec)
        _check_learned(way, learning, name, spec)
        if hole is not None:
            _window(hole, size_for(image, spec))
        elif factor is not None:
            _check_pixels(image, size_for(image, spec), factor)

    model = open_model(site, name, which, bundle, check)
    trained = _trained(way, learning, noise, repeats, model)
    asked = asked if asked.steps or not trained else asked.model_copy(update={"steps": TRAINED_STEPS})
    request = settled(model.at_size(asked, image), model)
    operator, y, before = measure(model, image, task, factor, hole)
    facts: dict[str, object] = {"command": "restore", "task": task, "factor": factor} | given_files(picture, mask)
    if trained:
        facts |= {"way": "trained"}
        converse = by_training(model, request, operator, y)
    else:
        repeats = repeats or REPEATS
        facts |= {"way": "zero-shot", "noise": noise, "repeats": repeats}
        converse = zero_shot(model, request, operator, y, noise=noise, repeats=repeats)
    x0 = answered("restore", converse, model)
    saved = written(x0, before, request, facts, out=target, model=model)
    off, rounded = (float(residual(operator, result, y).max()) for result in (x0, saved))
    say(f"  ||A x - y|| / sqrt(dim y)  {off:.2g}; in the PNG, rounded to 8 bits, {rounded:.2g} (white - black is 2)")
    return target


def zero_shot(
    model: Model, request: ResolvedRequest, operator: LinearOperator, y: Tensor, *, noise: float, repeats: int
) -> Callable[[], Conversation]:
    """The way of a model that only draws."""

    def converse() -> Conversation:
        sigmas = model.sigmas(request.steps)
        x = model.noise(Stream.INITIAL, request)(0) * sigmas[0].float()
        fresh = model.noise(Stream.CHURN, request)
        way = by_zero_shot(x, sigmas, fresh, operator, y, sigma_y=noise, repeats=repeats)
        return model.under(way, request)

    return converse


def by_training(
    model: Model, request: ResolvedRequest, operator: LinearOperator, y: Tensor
) -> Callable[[], Conversation]:
    """The way of a model that was shown such measurements: its own sampler, and y put into every answer exactly."""

    def converse() -> Conversation:
        sigmas = model.sigmas(request.steps)
        x = model.noise(Stream.INITIAL, request)(0) * sigmas[0].float()
        inner = SAMPLERS[request.sampler](x, sigmas, model.noise(Stream.CHURN, request))
        return model.under(null_space(inner, operator, y), request, beside(operator, operator.pinv(y)))

    return converse


def measure(
    model: Model, image: Image.Image, task: str, factor: int | None, mask: Image.Image | None
) -> tuple[LinearOperator, Tensor, Tensor]:
    """The operator of the task, what it says of the picture, and that as a picture to look at (1, 3, H, W)."""
    size = model.size_for(image)
    if task == "inpainting":
        operator = _window(mask, size)
        y = operator.forward(in_model(fitted(image, size, "picture"), model))
        return operator, y, operator.pinv(y)
    if task == "colorization" and factor is None:
        y = Grey().forward(in_model(fitted(image, size, "picture"), model))
        return Grey(), y, y.expand(1, 3, *size)
    blocks = BlockMean(factor)
    small = _small(image, blocks, model)
    if task == "super-resolution":
        return blocks, small, blocks.pinv(small)
    y = Grey().forward(small)
    return Composition(blocks, Grey()), y, blocks.pinv(y).expand(1, 3, *size)


def _window(mask: Image.Image, size: Size) -> Mask:
    """What stays of a picture.  Raises ValueError where that is nothing, or, as `mask_of`, all."""
    operator = Mask(mask_of(mask, size))
    if not operator.keep.any():
        raise ValueError(
            "the mask is white everywhere: nothing of the picture is kept. `diffusion sample` draws freely"
        )
    return operator


def _small(image: Image.Image, blocks: BlockMean, model: Model) -> Tensor:
    """What the blocks' means are of the picture: the picture itself, where it is small, (1, 3, H / factor, W / factor)."""
    size, factor = model.size_for(image), blocks.factor
    _check_pixels(image, size, factor)
    if not _has(image, size, 1):
        return in_model(fitted(image, (size[0] // factor, size[1] // factor), "picture"), model)
    say(f"  made small a picture of {image.width} x {image.height}: the means of {factor} x {factor} pixels are used")
    return blocks.forward(in_model(fitted(image, size, "picture"), model))


def _check_pixels(image: Image.Image, size: Size, factor: int) -> None:
    """The picture is large enough to grow to `size` by this factor."""
    if not _has(image, size, factor):
        raise ValueError(
            f"the picture is {image.width} x {image.height}, the model draws {size[1]} x {size[0]}:"
            f" {_factors_for(image, size)}"
        )


def _has(image: Image.Image, size: Size, factor: int) -> bool:
    """Whether a picture has the pixels of `size` made smaller by a factor, which divides it."""
    high, wide = cropped(image.height, image.width, size)
    return high >= size[0] // factor and wide >= size[1] // factor and not (size[0] % factor or size[1] % factor)


def _factors_for(image: Image.Image, size: Size) -> str:
    fitting = [factor for factor in FACTORS if _has(image, size, factor)]
    if not fitting:
        return f"it needs a picture of at least {size[1] // max(FACTORS)} x {size[0] // max(FACTORS)}"
    return f"give --factor {' or '.join(map(str, fitting))}"


def _check_learned(way: str | None, task: str, name: str, spec: BundleSpec) -> None:
    if way == "trained" and task not in spec.degradations:
        learned = ", ".join(spec.degradations) or "no restoration"
        raise ValueError(
            f"--way trained: {name} was trained for {learned}, not for {task}. Leave --way out, or train a model for it,"
            f" `diffusion run --preset restorer`, and give --name restorer"
        )


def _trained(way: str | None, task: str, noise: float, repeats: int | None, model: Model) -> bool:
    """Whether to go the trained way, and a line that says so."""
    learned = task in model.bundle.spec.degradations
    trained = way == "trained" or (way is None and learned and not noise and repeats is None)
    told = f"trained, {model.name} learned {task}" if trained else "zero-shot, by what a model that draws knows"
    say(f"  way        {told}")
    return trained


def _check_way(way: str | None, noise: float, repeats: int | None) -> None:
    if way not in (None, *WAYS):
        raise ValueError(f"--way {way}: the ways are {' and '.join(WAYS)}")
    if way == "trained" and noise:
        raise ValueError(
            f"--noise {noise} with --way trained: it has learned from measurements without noise. Give --way zero-shot"
        )
    if way == "trained" and repeats is not None:
        raise ValueError(
            f"--repeats {repeats} with --way trained: that way is gone once. Give --way zero-shot, or --steps"
        )


def _check(task: str, factor: int | None, mask: Path | None, noise: float, repeats: int | None) -> None:
    if task not in TASKS:
        raise ValueError(f"--task {task}: the tasks are {', '.join(TASKS)}")
    factors = " or ".join(map(str, FACTORS))
    if task == "super-resolution" and factor is None:
        raise ValueError(f"--factor is missing: --task {task} takes --factor {factors}")
    if task == "inpainting" and factor is not None:
        raise ValueError(f"--factor {factor}: --task {task} takes none, it is for super-resolution and colorization")
    if factor is not None and factor not in FACTORS:
        raise ValueError(f"--factor {factor}: --task {task} takes --factor {factors}")
    if task == "inpainting" and mask is None:
        raise ValueError(f"--mask is missing: --task {task} takes --mask PICTURE, white where something is missing")
    if task != "inpainting" and mask is not None:
        raise ValueError(f"--mask {mask}: --task {task} takes none, it is for inpainting")
    if not 0 <= noise <= 2:
        raise ValueError(f"--noise {noise}: give a standard deviation from 0 to 2, where black is -1 and white is 1")
    if repeats is not None and not 1 <= repeats <= 100:
        raise ValueError(f"--repeats {repeats}: give 1 to 100; 1 goes the way once")
