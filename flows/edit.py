"""edit: a picture changed towards a class or a prompt, by noising it or by carrying it to noise under its own and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from diffusion.data.pictures.buckets import Size
from diffusion.edit import by_condition, check_strength, levels_of, low_pass, sdedit
from diffusion.operators import Mask
from diffusion.random import Stream
from diffusion.restore import null_space
from diffusion.sampler import SAMPLERS, Conversation
from diffusion.serving.request import RequestError, resolve
from diffusion.store.bundle_spec import BundleSpec
from flows.console import say
from flows.pictures import (
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


def edit(
    site: Site,
    name: str,
    which: str,
    picture: Path,
    *,
    strength: float,
    from_label: str | None = None,
    from_prompt: str | None = None,
    bundle: Path | None = None,
    mask: Path | None = None,
    coarse: int | None = None,
    out: Path | None = None,
    options: dict[str, object],
) -> Path:
    """Edit the picture towards `options`' label and prompt into `out`, beside a strip before | after.  Returns the folder.

    strength: share of the steps that are gone, above 0 and up to 1.  from_label, from_prompt: what the picture is, which
    makes it an inversion; without either the picture is noised (SDEdit), `options["n"]` times.  mask: white where it may
    change.  coarse: side of the blocks whose means stay the picture's until the noise is as large as a picture.  options:
    fields of a GenerateRequest, None for the model's own.  Raises ValueError.
    """
    check_strength(strength)  # before the model is loaded
    target = folder(site, out, "edited", picture.stem)
    asked, image = parsed(**options), read(picture)
    with _of_the_origin():
        own = parsed(label=from_label, prompt=from_prompt, seed=asked.seed, guidance=1.0)
    inverts = (from_label, from_prompt) != (None, None)
    if inverts and asked.n != 1:
        given = "--from-label" if from_prompt is None else "--from-prompt"
        raise ValueError(f"--n {asked.n} with {given}: inversion draws nothing at random, so there is one result")
    hole = None if mask is None else mask_image(mask, image)

    def check(name: str, spec: BundleSpec) -> None:
        refuse_student(name, spec, "editing")
        _check_latents(name, spec, mask, coarse)
        sampler, size = resolve(asked, spec).sampler, size_for(image, spec)
        with _of_the_origin():
            resolve(own, spec)
        if inverts and SAMPLERS[sampler].stochastic:
            known = ", ".join(name for name, sampler in SAMPLERS.items() if not sampler.stochastic)
            raise ValueError(f"--sampler {sampler} adds noise, and inversion must not: give one of {known}")
        if coarse is not None and (coarse < 2 or any(side % coarse for side in size)):
            raise ValueError(f"--coarse {coarse}: give a divisor of the model's {_sides(size)} pixels, such as 8")
        if hole is not None:
            mask_of(hole, size)

    model = open_model(site, name, which, bundle, check)
    request, size = settled(model.at_size(asked, image), model), model.size_for(image)
    origin = settled(model.at_size(own, image), model)
    sigmas = model.sigmas(request.steps)
    before = in_model(fitted(image, size, "picture"), model)
    reference = model.seen(before)
    keep = None if hole is None else Mask(mask_of(hole, size))

    def solver(x: Tensor, sigmas: Tensor) -> Conversation:
        return SAMPLERS[request.sampler](x, sigmas, model.noise(Stream.CHURN, request))

    def wanted(conversation: Conversation) -> Conversation:
        if keep is not None:  # next to the sampler: the mask has the last word
            conversation = null_space(conversation, keep, keep.forward(reference))
        if coarse is not None:
            conversation = low_pass(conversation, reference, factor=coarse, until=model.bundle.spec.sigma_data)
        return model.under(conversation, request)

    def converse() -> Conversation:
        if not inverts:
            noise = model.noise(Stream.INITIAL, request)(0)
            return wanted(sdedit(solver, reference, noise, sigmas, strength=strength))
        levels = levels_of(sigmas, strength)
        return by_condition(solver, reference, levels, before=lambda c: model.under(c, origin), after=wanted)

    x0 = answered("edit", converse, model)
    facts = {"command": "edit", "strength": strength, "coarse": coarse} | given_files(picture, mask)
    facts |= {"from_label": from_label, "from_prompt": from_prompt}
    saved = written(x0, before, request, facts, out=target, model=model)
    change = (saved - before).square().mean().sqrt()
    say(f"  changed    by {float(change):.2g} root mean square (white - black is 2)")
    return target


def _sides(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[1]} x {size[0]}"


def _check_latents(name: str, spec: BundleSpec, mask: Path | None, coarse: int | None) -> None:
    if spec.codec and (mask is not None or coarse is not None):
        given = "--mask" if mask is not None else "--coarse"
        raise ValueError(
            f"{given}: {name} draws latents, of which each speaks of many pixels, so none of them can be kept exactly."
            f" Leave {given} out, or give a model that draws pixels"
        )


@contextmanager
def _of_the_origin() -> Iterator[None]:
    """A mistake in what the picture is said to be names the options that said it."""
    try:
        yield
    except RequestError as error:
        raise ValueError(f"--from-label, --from-prompt: {error}") from error
