"""Headers that every answer carries, whoever made it."""

import base64
import hashlib

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.adapters.http.page import PAGE


class SecureHeaders:
    """The application with them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        script, style = (_csp_hash(PAGE, tag) for tag in ("script", "style"))
        self.fixed = {
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"default-src 'none'; script-src {script}; style-src {style}; img-src data:;"
            " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.fixed)
            await send(message)

        await self.app(scope, receive, send_with if scope["type"] == "http" else send)


def _csp_hash(page: str, tag: str) -> str:
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
