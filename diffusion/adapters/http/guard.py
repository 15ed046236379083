"""Who may ask: requests to /v1/ and /metrics without a known key are refused before anything of them is read."""

from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from diffusion.adapters.http.account import Account
from diffusion.adapters.http.errors import ApiError
from diffusion.serving.keys import Keyring, NoKey, TooMany

GUARDED = ("/v1/", "/metrics")  # the page, its files and /healthz tell nothing, and a page must open to ask for a key


class Guard:
    """The application behind its keys.  What draws counts against a key's rate and concurrency until it is answered."""

    def __init__(self, app: ASGIApp, ring: Keyring) -> None:
        self.app, self.ring = app, ring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _path(scope).startswith(GUARDED) or not self.ring.wanted:
            await self.app(scope, receive, send)
            return
        account = Account.of(scope)
        try:
            key = self.ring.holder(_bearer(Headers(scope=scope).get("authorization", "")))
            account.key = key.name
            use = self.ring.using(key) if scope["method"] == "POST" else nullcontext()
            with use:
                await self.app(scope, receive, send)
        except NoKey as error:
            refused = ApiError(401, str(error))
            refused.headers["WWW-Authenticate"] = "Bearer"
        except TooMany as error:
            refused = ApiError(429, str(error), retry_after_s=error.retry_after_s, reason=error.reason)
        else:
            return
        account.reason = refused.reason
        await refused.response()(scope, receive, send)


def _path(scope: Scope) -> str:
    """As the routes see it."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))


def _bearer(header: str) -> str | None:
    scheme, _, secret = header.strip().partition(" ")
    return secret.strip() if scheme.lower() == "bearer" and secret.strip() else None
