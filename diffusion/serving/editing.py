"""Editing as the endpoint and the command do it: a given picture changed towards a class or a prompt, by noising it or by
carrying it to noise under its own and back."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from diffusion.edit import by_condition, levels_of, low_pass, sdedit
from diffusion.operators import Mask
from diffusion.recipe import ServeRecipe
from diffusion.restore import null_space
from diffusion.sampler import SAMPLERS, Conversation
from diffusion.serving.given import Given, at_size, check_mask, fit_note, keep_of, size_for
from diffusion.serving.job import Watch, under, unwatched
from diffusion.serving.request import Asked, Prompt, RequestError, ResolvedRequest, Whole
from diffusion.serving.rework import Converse, Rework, job_of, levels, refuse_student, resolved, start_of
from diffusion.store.bundle import Bundle
from diffusion.store.bundle_spec import BundleSpec

STRENGTH = 0.6


class EditRequest(Asked):
    """A picture to be changed towards `label` and `prompt`."""

    strength: Annotated[float, Field(strict=True)] = Field(
        STRENGTH, gt=0, le=1, description="Share of the steps that are gone: little near 0, at 1 nothing stays"
    )
    from_label: str | None = Field(None, description="The picture's own class: changes that and keeps the rest")
    from_prompt: Prompt | None = Field(None, description="What it shows now: changes that and keeps the rest")
    coarse: Whole | None = Field(
        None, ge=2, description="Keeps the coarse look: the means of blocks of so many pixels; null: free"
    )

    @property
    def inverts(self) -> bool:
        """Whether the picture is carried to noise under what it is, and not noised."""
        return (self.from_label, self.from_prompt) != (None, None)


def edit(
    asked: EditRequest,
    given: Given,
    mask: Given | None,
    bundle: Bundle,
    device: torch.device,
    limits: ServeRecipe | None = None,
) -> Rework:
    """What an engine with this bundle draws.  mask: white where the picture may change.  Raises RequestError."""
    request, origin = check_edit(asked, given, mask, bundle.spec, limits)
    size = size_for(given.image, bundle.spec)
    before = at_size(given.image, size, device)
    reference = bundle.codec.encode(before)[:, 0] if bundle.codec else before
    keep = mask and Mask(keep_of(mask.image, size))
    converse = _changing(asked, request, origin, reference, keep, bundle, device)
    facts: dict[str, object] = {"command": "edit", "strength": asked.strength, "coarse": asked.coarse}
    facts |= {"from_label": asked.from_label, "from_prompt": asked.from_prompt}
    facts |= {"given_sha256": given.sha256, "mask_sha256": mask and mask.sha256, "mask_hole": mask and mask.hole}
    return Rework(job_of(request, converse), before, facts, fit_note(given.image, size))


def _changing(
    asked: EditRequest,
    request: ResolvedRequest,
    origin: ResolvedRequest,
    reference: Tensor,
    keep: Mask | None,
    bundle: Bundle,
    device: torch.device,
) -> Converse:
    """reference: the picture as the network sees it.  origin: the request under what it is."""

    def converse(images: range, watch: Watch = unwatched) -> Conversation:
        sigmas = levels(request, bundle)
        initial, fresh = start_of(request, images, bundle, device)

        def solver(x: Tensor, sigmas: Tensor) -> Conversation:
            return SAMPLERS[request.sampler](x, sigmas, fresh)

        def wanted(conversation: Conversation) -> Conversation:
            conversation = watch(conversation)
            if keep is not None:  # next to the sampler: the mask has the last word
                conversation = null_space(conversation, keep, keep.forward(reference))
            if asked.coarse is not None:
                until = bundle.spec.sigma_data
                conversation = low_pass(conversation, reference, factor=asked.coarse, until=until)
            return under(conversation, request, len(images), bundle, device)

        if not asked.inverts:
            return wanted(sdedit(solver, reference, initial, sigmas, strength=asked.strength))
        return by_condition(
            solver,
            reference,
            levels_of(sigmas, asked.strength),
            before=lambda conversation: under(conversation, origin, len(images), bundle, device),
            after=wanted,
        )

    return converse


def check_edit(
    asked: EditRequest, given: Given, mask: Given | None, spec: BundleSpec, limits: ServeRecipe | None = None
) -> tuple[ResolvedRequest, ResolvedRequest]:
    """All that can be said without the weights.  Returns the request with nothing left open, and that under what the
    picture is.  Raises RequestError."""
    refuse_student(spec, "editing")
    _check_latents(spec, mask, asked.coarse)
    _check_number(asked)
    request = resolved(asked, given, spec, limits)
    try:
        own = Asked(label=asked.from_label, prompt=asked.from_prompt, seed=request.seed, guidance=1.0)
        origin = resolved(own, given, spec, None)
    except RequestError as error:  # a mistake in what the picture is said to be
        param = f"from_{error.param}"
        raise RequestError(f"from_label, from_prompt: {error}", param=param, allowed=error.allowed) from error
    size = size_for(given.image, spec)
    if asked.inverts:
        _check_sampler(request)
    if asked.coarse is not None and any(side % asked.coarse for side in size):
        sides = str(size[0]) if size[0] == size[1] else f"{size[1]} x {size[0]}"
        raise RequestError(
            f"coarse={asked.coarse}: give a divisor of the model's {sides} pixels, such as 8", param="coarse"
        )
    if mask is not None:
        check_mask(mask.image, given.image)
        keep_of(mask.image, size)
    return request, origin


def _check_number(asked: EditRequest) -> None:
    if asked.inverts and asked.n != 1:
        said = "from_label" if asked.from_prompt is None else "from_prompt"
        raise RequestError(
            f"n={asked.n} with {said}: inversion draws nothing at random, so there is one result",
            param="n",
            allowed=[1],
        )


def _check_sampler(request: ResolvedRequest) -> None:
    if SAMPLERS[request.sampler].stochastic:
        known = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
        raise RequestError(
            f"sampler={request.sampler} adds noise, and inversion must not: give one of {', '.join(known)}",
            param="sampler",
            allowed=known,
        )


def _check_latents(spec: BundleSpec, mask: Given | None, coarse: int | None) -> None:
    if spec.codec and (mask is not None or coarse is not None):
        said = "mask" if mask is not None else "coarse"
        raise RequestError(
            f"{said}: this model draws latents, of which each speaks of many pixels, so none of them can be kept exactly."
            f" Leave {said} out, or ask a model that draws pixels",
            param=said,
        )
