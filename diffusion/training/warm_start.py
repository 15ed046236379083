"""Starting from a trained model's weights instead of random ones: more data, a new class, a new condition.

What the new network has beyond the old one answers nothing at first - text attention and the stem of a picture beside x end
in zeros, as in a new network - so before its first step it answers as the model did, to the last bit where it computes in
the same precision.  The clock starts at 0: learning rate, its warm-up and the averages are the new run's own.

A student starts from its teacher's weights, to which nothing is added.
"""

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser
from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.codecs import identity_for
from diffusion.store.text_encoders import identity_of
from diffusion.training.step import TrainState

_LABELS = "net.embedding.label.weight"  # (classes + 1, width): the last row is the null label's
_NEW = re.compile(r"net\.(null_text$|image_stem\.|.*\.text_attentions\.)")  # what conditions bring


class Carried(NamedTuple):
    """What became of the model's classes."""

    kept: tuple[str, ...]
    new: tuple[str, ...]  # they start as no class does: with the row of the null label
    dropped: tuple[str, ...]  # no picture is of them any more: their rows are left behind


def check_origin(recipe: TrainRecipe, resolution: int, spec: BundleSpec) -> None:
    """Raises ValueError naming the first field in which a recipe's network, for pictures of this resolution, is not the
    model's with something added."""
    if spec.lesson:
        raise ValueError(
            "the model that it starts from is a student: it goes where its teacher's steps lead and does not denoise. Start"
            f" from its teacher: train.init={spec.lesson.teacher}"
        )
    own, given = recipe.unet, spec.unet
    first: list[tuple[str, Any, Any]] = [
        (f"unet.{name}", getattr(own, name), getattr(given, name))
        for name in ("channels", "multipliers", "blocks", "stem")
    ]
    first += [
        ("prediction", recipe.prediction, spec.prediction),
        *([("sigma_data", recipe.sigma_data, spec.sigma_data)] if spec.prediction == "edm" else []),
        ("codec", recipe.codec, spec.codec.name if spec.codec else "none"),
    ]
    if spec.text:  # one who reads nothing yet may learn to
        first += [
            ("text_encoder", recipe.text_encoder, spec.text.name),
            ("unet.text_width", own.text_width, given.text_width),
        ]
    if spec.degradations and not recipe.degradations:
        first.append(("degradations", (), spec.degradations))
    for name, here, there in first:
        if here != there:
            raise _other(name, here, there)
    levels = _attending(own, resolution // recipe.codec_factor)
    if levels != (wanted := _attending(given, spec.shape_at((spec.resolution, spec.resolution))[1])):
        sides = own.sides(resolution // recipe.codec_factor)
        raise _other(
            "unet.attention", own.attention, tuple(s for s, is_one in zip(sides, wanted, strict=True) if is_one)
        )


def check_teacher(recipe: TrainRecipe, classes: tuple[str, ...], spec: BundleSpec) -> None:
    """Raises ValueError naming the first field in which a student's network, or what it is shown, is not its teacher's."""
    for name, here, there in (
        ("train.unet", recipe.unet, spec.unet),
        ("train.sigma_data", recipe.sigma_data, spec.sigma_data),
        ("train.prediction", recipe.prediction, spec.prediction),
        ("train.text_encoder", identity_of(recipe), spec.text),
        ("train.codec", identity_for(recipe), spec.codec),
        ("what the dataset has as classes", classes, spec.classes),
    ):
        if here != there:
            raise ValueError(
                f"{name} is {here}, and the teacher {recipe.lesson.teacher[:12]} has {there}: a student is of its teacher's"
                " network and learns what that draws, so give the recipe and the pictures by which that was trained"
            )


@torch.no_grad()
def warm_start(state: TrainState, classes: tuple[str, ...], spec: BundleSpec, model: Denoiser) -> Carried:
    """Put the weights of a bundle's model (`store.bundle.load_model`) into a state at images_seen = 0 that learns these
    classes, and its averages.  Classes are told by their names.  No other condition than the classes differs: what
    captions and latents are is the same, or new.

    Raises ValueError naming the first difference where the network is not the model's with something added; the state
    is then unchanged.
    """
    if state.images_seen:
        raise ValueError(
            f"images_seen={state.images_seen}: only a run that has not begun starts from a model's weights"
        )
    for name, here, there in (("text", state.text, spec.text), ("codec", state.codec, spec.codec)):
        if there is not None and here != there:
            raise ValueError(
                f"the model that it starts from was trained with the {name} {there}, and here is {here}: the same"
                f" {'captions' if name == 'text' else 'pictures'} would be other numbers. Put its files back as they were"
            )
    own = dict(state.net.named_parameters())
    given = {name: weight.detach() for name, weight in model.named_parameters()}
    given[_LABELS] = _rows(given[_LABELS], spec.classes, classes)
    if state.net.precond != model.precond:
        raise _other("prediction", state.net.precond, model.precond)
    for name in [*own, *(name for name in given if name not in own)]:
        here, there = (tuple(some[name].shape) if name in some else None for some in (own, given))
        if here != there and not (there is None and _NEW.match(name)):
            raise ValueError(
                f"the weight {name} has the shape {here} here and {there} in the model: the networks differ in more than"
                f" classes and conditions. Give the recipe that the model was trained by, with what is new added"
            )
    for name, weight in given.items():
        own[name].copy_(weight)
    for sigma_rel in state.ema.averages:  # the first step replaces them; until then they are what the network is
        state.ema.load_state_dict(sigma_rel, own)
    return carried(spec.classes, classes)


def carried(old: tuple[str, ...], new: tuple[str, ...]) -> Carried:
    """What becomes of a model's classes in a run that learns new ones."""
    return Carried(
        kept=tuple(name for name in new if name in old),
        new=tuple(name for name in new if name not in old),
        dropped=tuple(name for name in old if name not in new),
    )


def _rows(labels: Tensor, old: tuple[str, ...], new: tuple[str, ...]) -> Tensor:
    """The embedding of the new classes and the null label, (new + 1, width), of the old ones' (old + 1, width)."""
    null = len(old)
    return labels[[old.index(name) if name in old else null for name in new] + [null]]


def _attending(unet: UNetRecipe, side: int) -> list[bool]:
    """Which levels have attention in a network for pictures of this side: its sides depend on it, its weights do not."""
    return [one in unet.attention for one in unet.sides(side)]


def _other(name: str, here: Any, there: Any) -> ValueError:
    shown = ",".join(map(str, there)) if isinstance(there, tuple) else there
    return ValueError(
        f"train.{name} is {here}, and of the model that it starts from {there}: weights fit the network that they are of"
        f" alone, to which classes and conditions may be added. Set train.{name}={shown}, or leave out --init"
    )
