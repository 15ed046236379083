"""Pictures of one request that took slots together: one conversation with the network, a row for each picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.sampler import Conversation, Query, watched
from diffusion.serving.forecast import Part
from diffusion.serving.job import unwatched
from diffusion.serving.ticket import DrawingFailed, Preview, Ticket
from diffusion.store.bundle import Bundle


@dataclass(eq=False)
class Flight:
    """A ticket's pictures `images`, their conversation and its open query."""

    ticket: Ticket
    images: range
    bundle: Bundle
    conversation: Conversation | None = None
    query: Query | None = None
    heard: int = 0  # answers, of the job's `shown`
    answered: int = 0  # of the job's `evaluations`

    @classmethod
    def depart(cls, ticket: Ticket, images: range, bundle: Bundle) -> "Flight | None":
        """Begin the conversation; where that is impossible the ticket fails and there is no flight."""
        try:
            flight = cls(ticket, images, bundle)
            watch = flight._watching if ticket.previews and ticket.show else unwatched
            flight.conversation = ticket.job.converse(images, watch)
            flight.query = next(flight.conversation)
            return flight
        except Exception as error:
            ticket.fail(DrawingFailed(f"the request could not be started: {error}"))
            return None

    def hand(self, answer: Tensor, *, finite: bool) -> bool:
        """Give the conversation its answer.  Returns whether it asks again.  Its failure is its own ticket's alone."""
        if not finite:
            self.ticket.fail(DrawingFailed("the network's answer is not finite: the weights overflow on this request"))
            return False
        self.answered += 1
        self.ticket.asked += len(self.images)
        try:
            x0 = self._send(answer)
            if x0 is not None:
                off = self.ticket.job.off
                self.ticket.add(self.images.start, list(self.bundle.pictures(x0).numpy()), off and off(x0).tolist())
            return x0 is None
        except Exception as error:
            self.ticket.fail(DrawingFailed(f"the sampler failed: {error}"))
            return False

    @property
    def left(self) -> Part:
        """What is still to be asked."""
        job = self.ticket.job
        return Part(len(self.images), job.rows, max(1, job.evaluations - self.answered))

    def _watching(self, conversation: Conversation) -> Conversation:
        return watched(conversation, self._shown)

    def _shown(self, answer: Tensor) -> None:
        """Give the ticket a preview where one is due: they are evenly spaced, and none is of the last answer."""
        ticket, job = self.ticket, self.ticket.job
        previews = min(ticket.previews, job.shown - 1)
        before, self.heard = self.heard, self.heard + 1
        number = before * (previews + 1) // job.shown
        if self.heard * (previews + 1) // job.shown == number or number == previews:
            return
        looks = job.known(answer) if job.known else answer
        for i, picture in enumerate(self.bundle.pictures(looks).numpy()):
            ticket.show(Preview(self.images.start + i, number, picture))

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
