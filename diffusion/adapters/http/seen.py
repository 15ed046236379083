"""Every request seen: it has an id, which its answer carries, is counted, and leaves a line in the log."""

import logging
import logging.handlers
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.adapters.http.account import Account
from diffusion.adapters.http.errors import told
from diffusion.adapters.request_id import HEADER

log = logging.getLogger("diffusion.requests")
_log = logging.getLogger(__name__)


class Seen:
    """The application, whose requests are seen.  routes: the paths there are, once they are known.  echoes: whether answers
    get the id here.  ended: are told of each request at its end."""

    def __init__(
        self, app: ASGIApp, routes: Callable[[], set[str]], ended: Sequence[Callable[[Account], None]], echoes: bool
    ) -> None:
        self.app, self.routes, self.ended, self.echoes = app, routes, ended, echoes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        account = Account.opened(scope, headers.get(HEADER, ""), self.routes())
        account.trace = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                if self.echoes:
                    MutableHeaders(scope=message)[HEADER] = account.id
            await send(message)

        try:
            await self.app(scope, receive, send_with)
        except Exception as error:  # a defect of ours, which nothing inside has answered
            if account.status is not None:
                raise
            refused = told(error, account.id)
            account.reason = refused.reason
            await refused.response()(scope, receive, send_with)
        finally:
            account.close(scope)
            for tell in self.ended:
                tell(account)
            log.info(account.line())


def write_to(file: Path) -> None:
    """Requests leave their lines at the end of this file; one that is moved away is made anew, with its folder."""
    handler = _Lines(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


class _Lines(logging.handlers.WatchedFileHandler):
    """A line that cannot be written, where the disk is full or the file another's, is no failure of its request."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        _log.warning("%s: a request's line is lost: %s", self.baseFilename, sys.exc_info()[1])
        stream, self.stream = self.stream, None  # what it holds back it would fail to write again
        with suppress(OSError):
            if stream is not None:
                stream.close()

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()
