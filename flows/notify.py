"""Telling the site's people: a webhook or a command hears when a run failed, and when a model was promoted or refused.

`DIFFUSION_NOTIFY` is an address, http:// or https://, to which the message is posted as JSON, or a command, which gets it on
its standard input.  It is read from the environment alone and is in no recipe, parameter or log: such an address is often
a secret itself.  Whoever does not answer within `LIMIT_S` is given up, and a run never fails by what is told of it.
"""

import json
import os
import shlex
import signal
import subprocess
import threading
import urllib.request
from typing import Literal
from urllib.error import URLError
from urllib.parse import urlsplit

from diffusion.recipe import Frozen
from diffusion.serving.keys import is_loopback
from diffusion.store.scrub import scrubbed
from flows.console import warn

VARIABLE = "DIFFUSION_NOTIFY"
LIMIT_S = 10.0
_LONGEST = 2_000  # characters of a text

Event = Literal["failed", "promoted", "refused"]


class Message(Frozen):
    """What is told.  text: a sentence, which is what chats show; facts: of the run or the model."""

    event: Event
    text: str
    facts: dict[str, str | list[str]] = {}


def notify(event: Event, text: str, **facts: str | list[str]) -> bool:
    """Tell, where anybody is to be told.  Returns whether it was told; where it could not be, a line says why."""
    target = os.environ.get(VARIABLE, "").strip()
    if not target:
        return False
    message = Message(event=event, text=_clean(text), facts={name: _clean(fact) for name, fact in facts.items()})
    failed: list[str] = []

    def tell() -> None:
        try:
            _post(target, message) if target.startswith(("http://", "https://")) else _run(target, message)
        except Exception as error:
            failed.append(scrubbed(_why(error)))

    telling = threading.Thread(target=tell, daemon=True, name="notify")
    telling.start()
    telling.join(LIMIT_S + 1)  # a name server may keep us longer than any socket's limit does
    if telling.is_alive():
        failed.append(f"no answer within {LIMIT_S:g} s")
    if failed:
        warn(f"nobody was told of it by {VARIABLE}: {failed[0]}")
    return not failed


def _clean(fact: str | list[str]) -> str | list[str]:
    return [_clean(each) for each in fact] if isinstance(fact, list) else scrubbed(fact)[:_LONGEST]


def _body(message: Message) -> bytes:
    return json.dumps(message.model_dump(), ensure_ascii=False).encode()


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Nowhere: what is told is for the address that was given."""


def _post(address: str, message: Message) -> None:
    asked = urllib.request.Request(address, _body(message), {"Content-Type": "application/json"})
    direct = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(address).hostname or "") else []
    with urllib.request.build_opener(_Stay, *direct).open(asked, timeout=LIMIT_S):
        pass


def _run(command: str, message: Message) -> None:
    null = subprocess.DEVNULL
    with subprocess.Popen(
        shlex.split(command), stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
    ) as process:
        try:
            process.communicate(_body(message), timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            raise TimeoutError(f"the command took more than {LIMIT_S:g} s and was ended") from None
    if process.returncode:
        raise OSError(f"the command ended with {process.returncode}")


def _why(error: Exception) -> str:
    reason = error.reason if isinstance(error, URLError) else error
    return f"{reason}" or type(error).__name__
