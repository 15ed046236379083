"""How long a request takes, measured on the path that serves: alone, and with every slot taken.

The numbers are this machine's and this moment's, so they are in no report, which is a function of the model alone.
"""

import math
import time

from diffusion.recipe import Frozen
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import device_name, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, ResolvedRequest, resolve

REQUESTS = 20  # of each kind, where time allows
_BUDGET_S = 30.0  # of each kind; then as many as there were


class Latency(Frozen):
    """Seconds from the request to its PNG, for one picture drawn as the model draws by default."""

    alone_p50: float
    alone_p95: float
    full_p50: float  # while all slots draw
    full_p95: float
    slots: int
    device: str


def measure(engine: Engine, *, requests: int = REQUESTS) -> Latency:
    """Of an engine that is not started.  The first request is not counted: it warms up what is warm when serving."""
    engine.start()
    try:
        asked = _requests(engine)
        _answered(engine, asked[:1])
        alone = _repeated(engine, asked[:1], requests)
        full = _repeated(engine, asked, requests)
    finally:
        engine.stop()
    return Latency(
        alone_p50=_quantile(alone, 0.5),
        alone_p95=_quantile(alone, 0.95),
        full_p50=_quantile(full, 0.5),
        full_p95=_quantile(full, 0.95),
        slots=engine.slots,
        device=device_name(engine.device),
    )


def _requests(engine: Engine) -> list[ResolvedRequest]:
    """One for each slot, of all classes in turn."""
    spec = engine.bundle.spec
    prompt = "a picture" if spec.text else None
    return [
        resolve(GenerateRequest(label=spec.classes[i % len(spec.classes)], prompt=prompt, seed=i), spec)
        for i in range(engine.slots)
    ]


def _repeated(engine: Engine, together: list[ResolvedRequest], requests: int) -> list[float]:
    """Seconds of each of about so many requests, that many at a time."""
    began, seconds = time.monotonic(), []
    while len(seconds) < requests and (not seconds or time.monotonic() - began < _BUDGET_S):
        seconds += _answered(engine, together)
    return seconds


def _answered(engine: Engine, together: list[ResolvedRequest]) -> list[float]:
    began, seconds, bundle = time.monotonic(), [], engine.bundle
    tickets = [engine.submit(engine.job(request)) for request in together]
    identity = {"bundle_digest": bundle.digest, "model": "latency", "version": "0", "device": engine.device}
    for ticket, request in zip(tickets, together, strict=True):
        (picture,) = ticket.future.result()
        stamp(picture, receipt_of(picture, 0, request, bundle.spec, **identity))
        seconds.append(time.monotonic() - began)
    return seconds


def _quantile(seconds: list[float], share: float) -> float:
    """The smallest of them that `share` of them do not exceed, to a thousandth."""
    return round(sorted(seconds)[max(0, math.ceil(share * len(seconds)) - 1)], 3)
