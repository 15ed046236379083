"""Load for an endpoint: requests of several tasks and lengths that arrive at random, or as fast as they are answered.

In the open loop requests arrive as a Poisson process whether others are answered or not, as those of many people do, and a
request's time runs from the moment it was due: a server that is slow for a while cannot put off what comes.
"""

import http.client
import json
import math
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from diffusion.data.images import encode_png
from diffusion.recipe import Frozen

GENERATION, EDIT = "generation", "edit"
MOST_AT_ONCE = 512  # requests under way; what comes beyond waits here, and its time runs
_BOUNDARY = "diffusion-load-7b1e"


class Mix(Frozen):
    """What is asked for, each kind equally often.  guidance: None for the model's own."""

    tasks: tuple[str, ...]  # of `tasks_of`
    steps: tuple[int | None, ...] = (None,)  # None for the model's own
    guidance: tuple[float | None, ...] = (None,)


class Ask(NamedTuple):
    """One request, ready to be sent."""

    task: str
    path: str
    kind: str  # Content-Type
    body: bytes


class Answer(NamedTuple):
    """What became of a request.  status: 0 where there was no answer.  seconds: since it was due."""

    task: str
    status: int
    seconds: float
    retry_after: bool
    said: str = ""  # why there are no pictures


def model_of(url: str, key: str | None = None) -> Mapping:
    """What GET /v1/models says of the endpoint's model.  Raises ValueError where there is none."""
    try:
        status, _, body = _send(url, "GET", "/v1/models", key, timeout_s=10)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url} does not answer ({error}): `diffusion deploy` starts an endpoint") from error
    if status == 401:
        raise ValueError(f"{url} wants a key: give --key, or set DIFFUSION_KEY; `diffusion keys add NAME` makes one")
    try:
        if status != 200:
            raise ValueError(f"status {status}")
        return json.loads(body)["data"][0]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{url} is no endpoint of this program: GET /v1/models gave no model ({error})") from error


def tasks_of(model: Mapping) -> tuple[str, ...]:
    """The tasks that a model can be asked for."""
    edits = (EDIT,) if model.get("edits") else ()
    return (GENERATION, *model.get("restorations", ()), *edits)


def asks(model: Mapping, mix: Mix, count: int, seed: int = 0) -> list[Ask]:
    """That many requests, a function of the seed.  Raises ValueError for a task that the model cannot be asked for."""
    if unknown := set(mix.tasks) - set(tasks_of(model)):
        raise ValueError(f"task {min(unknown)!r}: this model can be asked for {', '.join(tasks_of(model))}")
    random = np.random.default_rng(seed)
    width, height = (int(side) for side in model["sizes"][0].split("x"))
    picture = encode_png(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    hole = np.zeros((height, width, 3), np.uint8)
    hole[:, width // 2 :] = 255
    mask, made = encode_png(hole), []
    for number in range(count):
        task, steps, guidance = (each[int(random.integers(len(each)))] for each in (mix.tasks, mix.steps, mix.guidance))
        label = model["classes"][number % len(model["classes"])]
        fields = {"label": label, "seed": number, "steps": steps, "guidance": guidance}
        fields = {name: value for name, value in fields.items() if value is not None}
        if task == GENERATION:
            made.append(Ask(task, "/v1/images/generations", "application/json", json.dumps(fields).encode()))
            continue
        files = {"image": picture}
        if task != EDIT:
            fields["task"] = task
            files |= {"mask": mask} if task == "inpainting" else {}
            fields |= {"factor": model["factors"][0]} if task == "super-resolution" else {}
        path = "/v1/images/edits" if task == EDIT else "/v1/images/restorations"
        made.append(Ask(task, path, f"multipart/form-data; boundary={_BOUNDARY}", _form(fields, files)))
    return made


def open_loop(
    url: str,
    asked: Sequence[Ask],
    rate: float,
    *,
    key: str | None = None,
    timeout_s: float = 300,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Send the requests at `rate` a second, at random moments that are a function of the seed."""
    due = np.cumsum(np.random.default_rng([seed, 1]).exponential(1 / rate, len(asked)))
    began = time.monotonic()
    under_way: list[Future[Answer]] = []

    def told() -> None:  # counted here: threads that each add one may lose some
        progress(sum(each.done() for each in under_way), len(asked))

    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        for ask, at in zip(asked, due.tolist(), strict=True):
            while (left := began + at - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
                told()
            under_way.append(pool.submit(_answered, url, ask, key, timeout_s, began + at))
        while wait(under_way, timeout=0.1).not_done:
            told()
        told()
        return [each.result() for each in under_way]


def closed_loop(
    url: str,
    asked: Sequence[Ask],
    clients: int,
    *,
    key: str | None = None,
    timeout_s: float = 300,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Send the requests by so many clients, each its next one when the last is answered."""
    with ThreadPoolExecutor(clients) as pool:
        answers = []
        for answer in pool.map(lambda ask: _answered(url, ask, key, timeout_s, time.monotonic()), asked):
            answers.append(answer)
            progress(len(answers), len(asked))
        return answers


class Figures(NamedTuple):
    """Of the answered requests of a task: how many, and the seconds that 50, 95 and 99 of 100 did not exceed."""

    answered: int
    p50: float
    p95: float
    p99: float


def figures(answers: Sequence[Answer]) -> dict[str, Figures]:
    """By task, and of all together, "all"."""
    found = {}
    for task in ("all", *dict.fromkeys(answer.task for answer in answers)):
        seconds = sorted(a.seconds for a in answers if a.status == 200 and task in ("all", a.task))
        if seconds:
            found[task] = Figures(len(seconds), *(_quantile(seconds, share) for share in (0.5, 0.95, 0.99)))
    return found


def refusals(answers: Sequence[Answer]) -> dict[int, int]:
    """Status -> number of the requests that were not answered with a picture."""
    counts: dict[int, int] = {}
    for answer in answers:
        if answer.status != 200:
            counts[answer.status] = counts.get(answer.status, 0) + 1
    return dict(sorted(counts.items()))


def _quantile(ascending: Sequence[float], share: float) -> float:
    """The smallest that this share do not exceed."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def _answered(url: str, ask: Ask, key: str | None, timeout_s: float, due: float) -> Answer:
    try:
        status, headers, body = _send(url, "POST", ask.path, key, body=ask.body, kind=ask.kind, timeout_s=timeout_s)
        waits, said = headers.get("Retry-After") is not None, "" if status == 200 else _reason(body)
    except (OSError, http.client.HTTPException) as error:
        status, waits, said = 0, False, str(error)
    return Answer(ask.task, status, time.monotonic() - due, waits, said)


def _reason(body: bytes) -> str:
    """Of an answer without pictures."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return ""


def _send(
    url: str, method: str, path: str, key: str | None, *, body: bytes = b"", kind: str = "", timeout_s: float
) -> tuple[int, Mapping, bytes]:
    place = _place(url)
    kind_of = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}[place.scheme]
    connection = kind_of(place.hostname, place.port, timeout=timeout_s)
    headers = {"Content-Type": kind} if kind else {}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    try:
        connection.request(method, place.path.rstrip("/") + path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def _place(url: str) -> urllib.parse.SplitResult:
    """Raises ValueError."""
    with suppress(ValueError):  # of a port that is none, of brackets that do not close
        place = urllib.parse.urlsplit(url)
        if place.scheme in ("http", "https") and place.hostname and place.port != 0:
            return place
    raise ValueError(f"{url!r} is no address of an endpoint: give one such as http://127.0.0.1:7777")


def _form(fields: Mapping[str, object], files: Mapping[str, bytes]) -> bytes:
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, data in files.items():
        head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n'
        parts.append(head.encode() + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n")
    return b"".join(parts) + f"--{_BOUNDARY}--\r\n".encode()
