"""What an engine draws: the pictures of one request, each a conversation with the network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.degradation import image_channels
from diffusion.guidance import MODEL, Cond, autoguided, classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.sampler import SAMPLERS, Conversation, Noise, evaluations
from diffusion.serving.request import ResolvedRequest
from diffusion.spacing import sampling_sigmas
from diffusion.store.bundle import Bundle

Watch = Callable[[Conversation], Conversation]


def unwatched(conversation: Conversation) -> Conversation:
    """Nobody listens."""
    return conversation


@dataclass(frozen=True, eq=False)
class Job:
    """Pictures that an engine is to draw with its bundle.

    converse(images, watch): the conversation about these of the request's pictures, a row for each; a row must be a
    function of the request and its picture's number alone, so that it may be asked among any others.  What stands in
    `watch` hears every answer as the sampler does: guided, and mostly with what is known put into it.
    """

    request: ResolvedRequest
    converse: Callable[[range, Watch], Conversation]
    evaluations: int  # of the sampler, a picture: a guided pair of rows counts once
    shown: int  # of these, how many `watch` hears
    off: Callable[[Tensor], Tensor] | None = None  # x0 (B, C, H, W) -> (B,), how far from what was measured of them
    known: Callable[[Tensor], Tensor] | None = None  # puts that into answers which `watch` heard without it

    @property
    def rows(self) -> int:
        """Of the network that a picture asks in an evaluation, at most."""
        return 2 if self.request.guided else 1


def generation(request: ResolvedRequest, bundle: Bundle, device: torch.device) -> Job:
    """Pictures of nothing but the request."""
    asked = evaluations(request.sampler, request.steps)
    return Job(request, lambda images, watch: converse(request, images, bundle, device, watch), asked, asked)


def together(requests: Sequence[ResolvedRequest], bundle: Bundle, device: torch.device) -> Job:
    """Single pictures of requests that differ in class, prompt and seed alone, as one job: each has the bits it would have
    in a job of its own, and what lies between two questions is computed once for all.  Raises ValueError for others."""
    first, ways = requests[0], {_way(request) for request in requests}
    if len(ways) > 1 or any(request.n != 1 for request in requests):
        raise ValueError("requests that are drawn together ask for one picture each, drawn in one way")

    def conversation(images: range, watch: Watch) -> Conversation:
        some = [requests[i] for i in images]
        sigmas = sampling_sigmas(bundle.spec.sampling, first.steps)
        initial, fresh = (
            _noise([(request, 0) for request in some], stream, bundle, device)
            for stream in (Stream.INITIAL, Stream.CHURN)
        )
        inner = watch(SAMPLERS[first.sampler](initial(0) * sigmas[0].float().item(), sigmas, fresh))
        each = [condition(bundle, request.label_index, request.prompt, 1, device) for request in some]
        cond = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        return _guided(inner, first, cond, bundle, device)

    asked = evaluations(first.sampler, first.steps)
    return Job(first.model_copy(update={"n": len(requests)}), conversation, asked, asked)


def _way(request: ResolvedRequest) -> tuple:
    return (request.size, request.sampler, request.steps, request.guidance, request.guidance_kind, request.guided)


def converse(
    request: ResolvedRequest, images: range, bundle: Bundle, device: torch.device, watch: Watch = unwatched
) -> Conversation:
    """The sampler's conversation about these pictures of a request, with its condition and guidance around it."""
    sigmas = sampling_sigmas(bundle.spec.sampling, request.steps)
    initial, fresh = (noise_of(request, stream, images, bundle, device) for stream in (Stream.INITIAL, Stream.CHURN))
    inner = SAMPLERS[request.sampler](initial(0) * sigmas[0].float().item(), sigmas, fresh)
    return under(watch(inner), request, len(images), bundle, device)


def noise_of(request: ResolvedRequest, stream: Stream, images: range, bundle: Bundle, device: torch.device) -> Noise:
    """Step -> noise of these pictures, each a function of (seed, step, number of the picture) alone."""
    return _noise([(request, i) for i in images], stream, bundle, device)


def _noise(
    pictures: Sequence[tuple[ResolvedRequest, int]], stream: Stream, bundle: Bundle, device: torch.device
) -> Noise:
    shape = bundle.spec.shape_at(pictures[0][0].size)

    def noise(step: int) -> Tensor:
        # one picture at a time: a vectorized logarithm may depend on how many numbers are taken together
        drawn = [normal(request.seed, stream, torch.tensor([(step << 32) + i]), shape) for request, i in pictures]
        return torch.cat(drawn).to(device)

    return noise


def under(
    conversation: Conversation,
    request: ResolvedRequest,
    rows: int,
    bundle: Bundle,
    device: torch.device,
    *,
    image: Tensor | None = None,
) -> Conversation:
    """A conversation about `rows` pictures, asked for the request's class and prompt with its guidance.

    image: as in `condition`; guidance is towards class and prompt, beside it.
    """
    cond = condition(bundle, request.label_index, request.prompt, rows, device, image=image)
    return _guided(conversation, request, cond, bundle, device, image=image)


def _guided(
    conversation: Conversation,
    request: ResolvedRequest,
    cond: Cond,
    bundle: Bundle,
    device: torch.device,
    *,
    image: Tensor | None = None,
) -> Conversation:
    """The conversation asked for `cond`, a row for each picture, with the request's guidance."""
    if not request.guided:
        return conditioned(conversation, cond)
    recipe = bundle.spec.sampling
    where, rescale = recipe.guidance_interval, recipe.guidance_rescale
    if request.guidance_kind == "autoguidance":
        return autoguided(conversation, cond, request.guidance, where, rescale=rescale)
    null = condition(bundle, len(bundle.spec.classes), None, len(cond["label"]), device, image=image)
    return classifier_free(conversation, cond, null, request.guidance, where, rescale=rescale)


def condition(
    bundle: Bundle, label: int, prompt: str | None, rows: int, device: torch.device, *, image: Tensor | None = None
) -> Cond:
    """The same class and prompt for each of `rows` pictures.  label: the number of classes for none.  image: what stands
    beside x, (1, channels, R, R), of a model that restores; None to draw freely.

    Rows of all requests have the same columns, so that all can be asked together: where the model reads prompts or such
    pictures also those without one, and where it has a guide all say that the model itself is asked.
    """
    cond = {"label": torch.full((rows,), label, device=device)}
    if bundle.guide is not None:
        cond[MODEL] = torch.zeros(rows, dtype=torch.int64, device=device)
    if channels := image_channels(bundle.spec.degradations):
        shape = (channels, *bundle.spec.shape_at()[1:])
        nothing = torch.zeros(1, *shape, device=device)
        cond["image"] = (nothing if image is None else image).expand(rows, *shape)
    if bundle.encoder is None:
        return cond
    text = bundle.encoder([prompt or ""])._asdict()
    return cond | {name: value.to(device).expand(rows, *value.shape[1:]) for name, value in text.items()}
