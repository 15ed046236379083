"""Asking servers, with what they want of credentials, and their clocks."""

import json
import os
import time
import urllib.error
import urllib.request
from base64 import b64encode
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from flows.site_file import hidden


class Answer(NamedTuple):
    """status: of whatever kind.  skew_s: seconds by which this computer's clock is ahead; None where the server does not say
    what time it is."""

    status: int
    body: bytes
    skew_s: float | None

    @property
    def json(self) -> object:
        """None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Silent(Exception):
    """Nothing answers there; says why in a few words."""


def ask(
    url: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    patience_s: float = 5.0,
) -> Answer:
    """Raises Silent."""
    request = urllib.request.Request(url, body, headers or {}, method=method)
    asked = time.time()
    try:
        with urllib.request.urlopen(request, timeout=patience_s) as answer:
            return Answer(answer.status, answer.read(), _skew(answer.headers, asked))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read(), _skew(error.headers, asked))
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: it is no address
        reason = getattr(error, "reason", error)
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise Silent(f"nothing answers at {hidden('', url)} ({why})") from None


def authorization(user: str | None, password: str | None, token: str | None) -> dict[str, str]:
    """The header that such credentials make; none of none."""
    if user is not None and password is not None:
        return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {"Authorization": f"Bearer {token}"} if token else {}


def prefect_url(prefect: str | None) -> str | None:
    """Of the Prefect server that a command would use: the variable counts, see `Site.prepare`."""
    url = os.environ.get("PREFECT_API_URL") or prefect
    return url and url.rstrip("/")


def prefect_headers() -> dict[str, str]:
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    return authorization(user or None, password, os.environ.get("PREFECT_API_KEY"))


def mlflow_headers() -> dict[str, str]:
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return authorization(*map(os.environ.get, names))


def _skew(headers: Message, asked: float) -> float | None:
    """Against the middle of the time that the answer took; a Date header has whole seconds, of which half are expected."""
    try:
        said = parsedate_to_datetime(headers["Date"]).timestamp()
    except (TypeError, ValueError):
        return None
    return (asked + time.time()) / 2 - (said + 0.5)
