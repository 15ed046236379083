"""What Ray Serve's proxy does with a request whose replica dies.

By itself it answers 500 without a word.  A picture is a function of the model and the request, so where nothing was answered
yet the request is asked again: of another replica, or of the one that takes the place of the dead.
"""

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_TRIES = 3
_KEPT_BYTES = 2**26  # of a body, twice what the endpoint takes; a larger one is asked for once


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.  This module imports little: it is loaded in the proxy's process."""
    return [Middleware(Again)]


class Again:
    """Around the proxy's application, which returns without an answer where the replica died or the client left."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        heard, answered = _Heard(receive), False

        async def answer(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        for _ in range(_TRIES):
            await self.app(scope, heard.from_the_start(), answer)
            if answered or heard.client_left:
                return
            if heard.forgotten:
                break
        message = "the replica that drew this ended in its midst; ask again"
        body = {"error": {"message": message, "type": "server_error", "param": None, "allowed": None}}
        await JSONResponse(body, 503, {"Retry-After": "2"})(scope, receive, send)


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
