"""What restoring and editing a given picture have in common: what is asked, what is drawn, what the receipt says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.data.pictures.buckets import shown
from diffusion.random import Stream
from diffusion.recipe import ServeRecipe
from diffusion.sampler import Conversation, Noise, run, watched
from diffusion.serving.given import Given, size_for
from diffusion.serving.job import Job, Watch, noise_of
from diffusion.serving.receipt import ReworkReceipt, device_name, pixels_sha256
from diffusion.serving.request import Asked, GenerateRequest, RequestError, ResolvedRequest, resolve
from diffusion.spacing import detailed_sigmas
from diffusion.store.bundle import Bundle
from diffusion.store.bundle_spec import BundleSpec


@dataclass(frozen=True, eq=False)
class Rework:
    """Pictures to be made of a given one."""

    job: Job
    before: Tensor  # (1, 3, H, W) in [-1, 1]: the given one as the model is told it
    facts: Mapping[str, object]  # fields of the receipts
    notes: tuple[str, ...]  # for people: what was done to the given one first


def resolved(
    asked: Asked, given: Given, spec: BundleSpec, limits: ServeRecipe | None, **changed: object
) -> ResolvedRequest:
    """The request for pictures of the size at which the model works on the given one.  Raises RequestError."""
    said = asked.model_dump(include=set(Asked.model_fields)) | changed
    return resolve(GenerateRequest(**said, size=shown(size_for(given.image, spec))), spec, limits)


def refuse_student(spec: BundleSpec, what: str) -> None:
    """Raises RequestError for a few-step student, which answers at the levels of its own steps alone.  what: is asked."""
    if spec.lesson:
        raise RequestError(
            f"this model is a few-step student, which draws and no more: {what} asks at other noise levels than those it was"
            f" taught for. Ask its teacher, the version of bundle {spec.lesson.teacher[:16]}"
        )


def start_of(request: ResolvedRequest, images: range, bundle: Bundle, device: torch.device) -> tuple[Tensor, Noise]:
    """Initial noise of standard deviation 1 of these pictures, and their fresh noise by step."""
    initial, fresh = (noise_of(request, stream, images, bundle, device) for stream in (Stream.INITIAL, Stream.CHURN))
    return initial(0), fresh


def levels(request: ResolvedRequest, bundle: Bundle) -> Tensor:
    """The noise levels of the request's steps, down to where a picture's detail lies.  Returns (steps + 1,)."""
    return detailed_sigmas(bundle.spec.sampling, request.steps)


Converse = Callable[[range, Watch], Conversation]


def job_of(
    request: ResolvedRequest,
    converse: Converse,
    off: Callable[[Tensor], Tensor] | None = None,
    known: Callable[[Tensor], Tensor] | None = None,
) -> Job:
    """What an engine draws by a conversation, which is held once to count its questions: these do not depend on the
    answers, so it is answered with its own."""
    asked = shown = 0

    def echo(x: Tensor, _sigma: Tensor, **_cond: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return x

    def heard(_answer: Tensor) -> None:
        nonlocal shown
        shown += 1

    run(converse(range(1), lambda conversation: watched(conversation, heard)), echo)
    return Job(request, converse, asked, shown, off, known)


def receipts(
    rework: Rework, pictures: list[np.ndarray], bundle: Bundle, *, model: str, version: str, device: torch.device
) -> list[ReworkReceipt]:
    """Of each result, uint8 (H, W, 3)."""
    said = rework.job.request.model_dump(exclude={"label_index", "n", "size"})
    said |= {"model": model, "version": version, "bundle_digest": bundle.digest}
    said |= {"run_digest": bundle.spec.run_digest, "dataset_digest": bundle.spec.dataset_digest}
    said |= {"torch": torch.__version__, "device": device_name(device)}
    return [
        ReworkReceipt(**rework.facts, **said, image=i, pixels_sha256=pixels_sha256(picture))
        for i, picture in enumerate(pictures)
    ]
