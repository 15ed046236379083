"""/openapi.json held against what the routes do, by Schemathesis: data that fits it is taken, data that does not is refused,
and every answer has a status, a content type, headers and a body that it tells of."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.adapters.http import create_app
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from tests.fuzzed_files import MARK
from tests.integration.test_http import MODEL, answering
from tests.random_bundle import RESOLUTION, random_bundle, reading_bundle
from tests.running_engine import shelved

LIMITS = ServeRecipe(slots=4, queue=64, max_n=2, max_steps=6, timeout_s=60)
KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def picture(kind: str) -> bytes:
    """Half black and half white, so that it may be a picture and a mask."""
    image, file = Image.new("RGB", (RESOLUTION, RESOLUTION)), io.BytesIO()
    image.paste("#ffffff", (RESOLUTION // 2, 0, RESOLUTION, RESOLUTION))
    image.save(file, kind)
    return file.getvalue()


class Pictured:
    """The application, to which files of a form that are the word MARK come as pictures."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.pictures = app, [picture(kind) for kind in KINDS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, body, more = dict(scope["headers"]), b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        found = re.search(rb"boundary=([^;]+)", headers.get(b"content-type", b""))
        if found:
            mark, picture = (b"\r\n\r\n" + sent + b"\r\n--" + found[1] for sent in (MARK.encode(), self._any(body)))
            body = body.replace(mark, picture)
            headers |= {b"content-length": str(len(body)).encode()} if b"content-length" in headers else {}
        came = False

        async def receive_pictured() -> Message:
            nonlocal came
            if came:
                return await receive()
            came = True
            return {"type": "http.request", "body": body}

        await self.app({**scope, "headers": list(headers.items())}, receive_pictured, send)

    def _any(self, body: bytes) -> bytes:
        return self.pictures[len(body) % len(self.pictures)]


@pytest.mark.parametrize("kind", ["open", "reading, with keys"])
def test_what_is_told_is_what_is_done(kind: str, one_thread: None, tmp_path: Path) -> None:
    keys = kind != "open"
    access, asked = Access(keys=tmp_path / "keys.json"), []
    if keys:
        asked = ["-H", f"Authorization: Bearer {add(access.keys, 'fuzz', priority='high')}"]
    engine = Engine(reading_bundle() if keys else random_bundle(), slots=4, queue=64, timeout_s=60)
    with shelved(engine, MODEL) as shelf, answering(Pictured(create_app(shelf, LIMITS, access=access))) as client:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json", *asked]
        command += ["--checks=all", "--phases=coverage,fuzzing", "--seed=1", "--max-examples=12"]
        command += ["--continue-on-failure", "--generation-database=none", "--no-color"]
        here = os.environ | {
            "SCHEMATHESIS_HOOKS": "tests.fuzzed_files",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        ran = subprocess.run(command, cwd=tmp_path, env=os.environ | here, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"Tested: +11\n", ran.stdout), ran.stdout
