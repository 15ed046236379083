"""What Ray Serve's proxy does with a request whose replica dies, and with one that comes when there is none.

It answers the first 500 without a word.  A picture is a function of the model and the request, so where nothing was answered
yet the request is asked again: of another replica, or of the one that takes the place of the dead.  It answers the second
404, as though asking again were of no use; here that is a 503.

It also does what some headers of a request say: end it after so long, look away when the client leaves, prefer a replica.
They are meant for a balancer of one's own before it, but anybody may send them: none comes through.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.adapters import request_id

_TRIES = 3
_KEPT_BYTES = 2**26  # of a body, twice what the endpoint takes; a larger one is asked for once
_STEERING = ("x_request_timeout_seconds", "x_request_disconnect_disabled", "x_session_id", "serve_multiplexed_model_id")


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.  This module imports little: it is loaded in the proxy's process."""
    return [Middleware(Again)]


class Again:
    """Around the proxy's application, which returns without an answer where the replica died or the client left."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": [header for header in scope.get("headers", ()) if _is_passed_on(*header)]}
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        heard, answered, gone = _Heard(receive), False, False

        async def answer(message: Message) -> None:
            nonlocal answered, gone
            if message["type"] == "http.response.start":
                answered = True
                if gone := message["status"] in (404, 503) and _is_text(message):
                    await _later("nothing is served at the moment; ask again")(scope, receive, send)
            if not gone:
                await send(message)

        for _ in range(_TRIES):
            await self.app(scope, heard.from_the_start(), answer)
            if answered or heard.client_left:
                return
            if heard.forgotten:
                break
        await _later("the replica that drew this ended in its midst; ask again")(scope, receive, send)


def _is_passed_on(name: bytes, value: bytes) -> bool:
    """Neither what would steer the proxy, nor an id that is not sane: without one it makes one.

    It reads these as UTF-8, and answers 500 where they are none.
    """
    known = name.decode("latin-1").lower()
    if known == request_id.HEADER.lower():
        return request_id.is_sane(value.decode("latin-1"))
    return known.replace("-", "_") not in _STEERING


def _is_text(start: Message) -> bool:
    """Whether it is an answer of the proxy's own: the endpoint's errors are JSON."""
    return any(name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in start["headers"])


def _later(message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "server_error", "param": None, "allowed": None}}
    return JSONResponse(body, 503, {"Retry-After": "2"})


class _Heard:
    """What a client sent, which can be heard again."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.messages: list[Message] = []
        self.bytes, self.forgotten, self.client_left = 0, False, False

    def from_the_start(self) -> Receive:
        """All of it, and then what comes."""
        again = iter(list(self.messages))

        async def listen() -> Message:
            if (message := next(again, None)) is not None:
                return message
            message = await self.receive()
            self.client_left = self.client_left or message["type"] == "http.disconnect"
            self.bytes += len(message.get("body", b""))
            self.forgotten = self.forgotten or self.bytes > _KEPT_BYTES
            if self.forgotten:
                self.messages = []
            else:
                self.messages.append(message)
            return message

        return listen
