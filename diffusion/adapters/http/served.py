"""What the routes draw with, and how an answer waits for its pictures."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi import Request
from starlette.types import Message

from diffusion.adapters.http.account import Account
from diffusion.adapters.http.errors import ApiError
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.job import Job
from diffusion.serving.lineup import point_of
from diffusion.serving.priority import Priority
from diffusion.serving.receipt import AnyReceipt, Format, receipt_of, stamp
from diffusion.serving.rework import Rework, receipts
from diffusion.serving.shelf import Shelf
from diffusion.serving.ticket import DeadlineExceeded, Picture, Preview, Ticket
from diffusion.store.refs import ModelRef


@dataclass(frozen=True)
class Served:
    """The model that a request gets, an engine that runs with it, and the endpoint's limits."""

    engine: Engine
    model: ModelRef
    limits: ServeRecipe


async def chosen(
    request: Request, shelf: Shelf, limits: ServeRecipe, fields: Mapping[str, Any], files: Mapping[str, bytes]
) -> Served:
    """The model for a request with these fields, a seed among them, and files: the one it asks for, or by its share.  It is
    held until the request is over.

    Raises UnknownModel, Refused where it cannot be loaded, DeadlineExceeded where that takes too long.
    """
    asked, account = fields.get("model"), Account.of(request.scope)
    asked = asked if isinstance(asked, str) and asked else None  # what it is instead is refused with the other fields
    point, model = point_of(fields, files), None
    try:
        async with asyncio.timeout(limits.timeout_s):
            while True:  # it may be put away for another before it is taken, and another lineup may come
                model = shelf.offered()[0].choose(asked, point)
                if held := shelf.take(model):
                    account.holds.callback(shelf.give_back, held)
                    account.model = model
                    return Served(held.engine, model, limits)
                # shielded: others may wait for it as well
                await asyncio.shield(asyncio.wrap_future(shelf.summoned(model)))
    except TimeoutError:
        raise DeadlineExceeded(f"{model.name} version {model.version} was not loaded in time") from None


class Stamped(NamedTuple):
    """A picture as a file with its receipt inside."""

    data: bytes
    receipt: AnyReceipt
    off: float | None  # of a restored one: how far from what was given


@dataclass(frozen=True)
class Work:
    """What a request wants drawn: a job of the engine, and what it is made of where it is made of a given picture."""

    job: Job
    rework: Rework | None = None
    priority: Priority = "normal"
    timeout_s: float = math.inf
    format: Format = "png"  # of the answer's pictures

    @property
    def task(self) -> str:
        """generation, edit, or what is restored."""
        facts = self.rework.facts if self.rework else {}
        return str(facts.get("task") or facts.get("command") or "generation")

    def stamped(self, pictures: list[Picture], off: dict[int, float], served: Served) -> list[Stamped]:
        """The pictures with their receipts."""
        bundle, device, model = served.engine.bundle, served.engine.device, served.model
        if self.rework is not None:
            made = receipts(self.rework, pictures, bundle, model=model.name, version=model.version, device=device)
        else:
            names = {"bundle_digest": bundle.digest, "model": model.name, "version": model.version, "device": device}
            made = [
                receipt_of(picture, i, self.job.request, bundle.spec, **names) for i, picture in enumerate(pictures)
            ]
        both = enumerate(zip(pictures, made, strict=True))
        return [Stamped(stamp(picture, receipt, self.format), receipt, off.get(i)) for i, (picture, receipt) in both]


async def drawn(request: Request, work: Work, served: Served) -> list[Stamped]:
    """The pictures.  When the client goes away the ticket is cancelled, and with it its slots."""
    ticket = Account.of(request.scope).ticket = _submitted(work, served)
    gone, drawing = _gone(request), asyncio.wrap_future(ticket.future)
    try:
        await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ApiError(499, "the client closed the connection")
        pictures = drawing.result()
    finally:
        _end(ticket, drawing, gone)
    return await asyncio.to_thread(work.stamped, pictures, ticket.off, served)


def begun(request: Request, work: Work, served: Served, previews: int) -> AsyncGenerator[Preview | list[Stamped], None]:
    """Submits the work; then previews as they come, and the pictures.  When the client goes away, or the request is over,
    the ticket is cancelled."""
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

    def tell(preview: Preview | None) -> None:
        loop.call_soon_threadsafe(waiting.put_nowait, preview)

    account = Account.of(request.scope)
    ticket = account.ticket = _submitted(work, served, previews=previews, show=tell)
    ticket.future.add_done_callback(lambda _: tell(None))
    gone = _gone(request)
    gone.add_done_callback(lambda _: ticket.cancel())
    account.holds.callback(_end, ticket, gone)  # and not in the generator: one that is never begun has no end

    async def events() -> AsyncGenerator[Preview | list[Stamped], None]:
        while (preview := await waiting.get()) is not None:
            yield preview
        pictures = await asyncio.wrap_future(ticket.future)
        yield await asyncio.to_thread(work.stamped, pictures, ticket.off, served)

    return events()


def _submitted(work: Work, served: Served, **watching: object) -> Ticket:
    return served.engine.submit(work.job, priority=work.priority, timeout_s=work.timeout_s, **watching)


def _end(ticket: Ticket, *tasks: asyncio.Future) -> None:
    ticket.cancel()
    for task in tasks:
        task.cancel()


def _gone(request: Request) -> asyncio.Future:
    async def disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return asyncio.ensure_future(disconnected(request.receive))
