"""What is remembered of a request: enough to find it again and to say where its time went.  Never its prompt, its key or a
picture."""

import json
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

from starlette.types import Scope

from diffusion.adapters.request_id import is_sane
from diffusion.serving.priority import Priority
from diffusion.serving.ticket import DeadlineExceeded, Ticket
from diffusion.store.refs import ModelRef

_SCOPE = "diffusion.account"


@dataclass(eq=False)
class Account:
    """Of one request.  What is not known stays None."""

    id: str
    route: str
    method: str
    began: float = field(default_factory=time.monotonic)  # seconds of time.monotonic()
    seconds: float | None = None  # the whole, once it is over
    status: int | None = None  # None: the client left before there was one
    key: str | None = None  # the key's name
    priority: Priority = "normal"  # the highest that may be asked for
    reason: str | None = None  # why it was refused
    task: str | None = None
    n: int | None = None
    steps: int | None = None
    ticket: Ticket | None = None
    model: ModelRef | None = None  # that it got
    trace: dict[str, str] = field(default_factory=dict)  # the client's, as W3C's Trace Context has its headers
    holds: ExitStack = field(default_factory=ExitStack)  # what it uses until it is over

    @classmethod
    def of(cls, scope: Scope) -> "Account":
        """That of a request on its way."""
        return scope[_SCOPE]

    @classmethod
    def opened(cls, scope: Scope, asked_id: str, routes: set[str]) -> "Account":
        """For a request that has come.  A path that is no route is not remembered: anything may stand in it."""
        path = scope["path"]
        account = cls(
            asked_id if is_sane(asked_id) else uuid.uuid4().hex, path if path in routes else "other", scope["method"]
        )
        scope[_SCOPE] = account
        return account

    @property
    def outcome(self) -> str:
        """done, cancelled, or why there are no pictures."""
        ended = self.ticket and self.ticket.future
        if self.reason is not None:
            return self.reason
        if (ended and ended.cancelled()) or self.status in (None, 499):
            return "cancelled"
        if ended and ended.done() and (error := ended.exception()):  # in the middle of a stream
            return "deadline" if isinstance(error, DeadlineExceeded) else "failed"
        return "done"

    def close(self, scope: Scope) -> None:
        """The request is over."""
        self.seconds = time.monotonic() - self.began
        self.holds.close()
        if route := scope.get("route"):  # its template, where one was found
            self.route = route.path

    def line(self) -> str:
        """A line of JSON for the log, of a request that is over."""
        about = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "outcome": self.outcome,
            "seconds": self.seconds,
            "key": self.key,
            "model": self.model and self.model.name,
            "version": self.model and self.model.version,
            "task": self.task,
            "n": self.n,
            "steps": self.steps,
        }
        if self.ticket is not None:
            about |= {"waited_s": self.ticket.waited_s, "drew_s": self.ticket.drew_s}
        rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in about.items()}
        return json.dumps({name: value for name, value in rounded.items() if value is not None})
