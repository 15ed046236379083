"""Who may ask: requests to /v1/ and /metrics without a known key are refused before anything of them is read.

Where no key is wanted only this machine may ask, by a name of its own: a page that has its foreign name point here, and so
passes for this endpoint's own page, is refused [DNS rebinding], and so is who came by way of a proxy.
"""

from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.adapters.http.account import Account
from diffusion.adapters.http.errors import ApiError
from diffusion.serving.keys import Keyring, NoKey, TooMany, is_loopback

GUARDED = ("/v1/", "/metrics")  # the page, its files and /healthz tell nothing, and a page must open to ask for a key


class Guard:
    """The application behind its keys.  What draws counts against a key's rate and concurrency until it is answered."""

    def __init__(self, app: ASGIApp, ring: Keyring) -> None:
        self.app, self.ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _path(scope).startswith(GUARDED):
            await self.app(scope, receive, send)
            return
        account = Account.of(scope)
        try:
            if not self.ring.wanted:
                self._check_name(scope)
                await self.app(scope, receive, send)
                return
            key = self.ring.holder(_bearer(Headers(scope=scope).get("authorization", "")))
            account.key, account.priority = key.name, key.priority
            with ExitStack() as use:
                if scope["method"] == "POST":
                    use.enter_context(self.ring.using(key))

                async def send_with(message: Message) -> None:
                    if message["type"] == "http.response.body" and not message.get("more_body"):
                        use.close()  # before the client has it all, and asks again
                    await send(message)

                await self.app(scope, receive, send_with)
        except ApiError as error:
            refused = error
        except NoKey as error:
            refused = ApiError(401, str(error))
            refused.headers["WWW-Authenticate"] = "Bearer"
        except TooMany as error:
            refused = ApiError(429, str(error), retry_after_s=error.retry_after_s, reason=error.reason)
        else:
            return
        account.reason = refused.reason
        await refused.response()(scope, receive, send)

    def _check_name(self, scope: Scope) -> None:
        """Raises ApiError 403."""
        name = _host(Headers(scope=scope).get("host", "localhost"))
        if not self.ring.access.by_any_name and not is_loopback(name):
            raise ApiError(
                403,
                f"this endpoint has no keys and answers as this machine alone, not as {name[:80]!r}: make a key with"
                f" `diffusion keys add NAME`",
            )


def _path(scope: Scope) -> str:
    """As the routes see it."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    return name.lower()


def _bearer(header: str) -> str | None:
    scheme, _, secret = header.strip().partition(" ")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None
