"""Pictures of one request that took slots together: one conversation with the network, a row for each picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.degradation import image_channels
from diffusion.guidance import MODEL, Cond, autoguided, classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.sampler import SAMPLERS, Conversation, Noise, Query
from diffusion.serving.request import ResolvedRequest
from diffusion.serving.ticket import DrawingFailed, Ticket
from diffusion.spacing import sampling_sigmas
from diffusion.store.bundle import Bundle


def converse(request: ResolvedRequest, images: range, bundle: Bundle, device: torch.device) -> Conversation:
    """The sampler's conversation about these pictures of a request, with its condition and guidance around it."""
    sigmas = sampling_sigmas(bundle.spec.sampling, request.steps)
    initial, fresh = (noise_of(request, stream, images, bundle, device) for stream in (Stream.INITIAL, Stream.CHURN))
    inner = SAMPLERS[request.sampler](initial(0) * sigmas[0].float().item(), sigmas, fresh)
    return under(inner, request, len(images), bundle, device)


def noise_of(request: ResolvedRequest, stream: Stream, images: range, bundle: Bundle, device: torch.device) -> Noise:
    """Step -> noise of these pictures, each a function of (seed, step, number of the picture) alone."""
    shape = bundle.spec.shape_at(request.size)

    def noise(step: int) -> Tensor:
        # one picture at a time: a vectorized logarithm may depend on how many numbers are taken together
        drawn = [normal(request.seed, stream, torch.tensor([(step << 32) + i]), shape) for i in images]
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
    if not request.guided:
        return conditioned(conversation, cond)
    recipe = bundle.spec.sampling
    where, rescale = recipe.guidance_interval, recipe.guidance_rescale
    if request.guidance_kind == "autoguidance":
        return autoguided(conversation, cond, request.guidance, where, rescale=rescale)
    null = condition(bundle, len(bundle.spec.classes), None, rows, device, image=image)
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


@dataclass(eq=False)
class Flight:
    """A ticket's pictures `images`, their conversation and its open query."""

    ticket: Ticket
    images: range
    conversation: Conversation
    query: Query
    bundle: Bundle

    @classmethod
    def depart(cls, ticket: Ticket, images: range, bundle: Bundle, device: torch.device) -> "Flight | None":
        """Begin the conversation; where that is impossible the ticket fails and there is no flight."""
        try:
            conversation = converse(ticket.request, images, bundle, device)
            return cls(ticket, images, conversation, next(conversation), bundle)
        except Exception as error:
            ticket.fail(DrawingFailed(f"the request could not be started: {error}"))
            return None

    def hand(self, answer: Tensor, *, finite: bool) -> bool:
        """Give the conversation its answer.  Returns whether it asks again.  Its failure is its own ticket's alone."""
        if not finite:
            self.ticket.fail(DrawingFailed("the network's answer is not finite: the weights overflow on this request"))
            return False
        self.ticket.asked += len(self.images)
        try:
            x0 = self._send(answer)
            if x0 is not None:
                self.ticket.add(self.images.start, list(self.bundle.pictures(x0).numpy()))
            return x0 is None
        except Exception as error:
            self.ticket.fail(DrawingFailed(f"the sampler failed: {error}"))
            return False

    def _send(self, answer: Tensor) -> Tensor | None:
        try:
            self.query = self.conversation.send(answer)
            return None
        except StopIteration as done:
            return done.value


def gather(queries: Sequence[Query]) -> Query:
    """The rows of all queries as one query.  They must be asked under the same kinds of condition."""
    return Query(
        torch.cat([query.x for query in queries]),
        torch.cat([query.sigma for query in queries]),
        {name: torch.cat([query.cond[name] for query in queries]) for name in queries[0].cond},
    )
