"""Traces, where a collector is named: each request that is over becomes a span, with its parts below it.

The spans are made at the request's end from the times its account has anyway, so that nothing is measured twice, and nothing
at all where nobody collects.  They carry what the log's line has: no prompt, class, seed, key or picture.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping

from diffusion.adapters.http.account import Account

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # OpenTelemetry's own names
_log = logging.getLogger(__name__)
Trace = Callable[[Account], None]


def tracing(environ: Mapping[str, str] = os.environ) -> Trace | None:
    """What is to be told of each request that is over; None where no collector is named, or OpenTelemetry is not installed,
    which the log then says.  All else OpenTelemetry reads from the environment itself: headers, sampler, its name."""
    if not any(environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        _log.warning(
            "no traces: %s. `pip install opentelemetry-exporter-otlp-proto-http` brings what is missing", error
        )
        return None
    named = {} if environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "diffusion"}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return _to(provider)


def _to(provider) -> Trace:
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer, context_of = provider.get_tracer("diffusion"), TraceContextTextMapPropagator().extract

    def told(account: Account) -> None:
        off = time.time_ns() - time.monotonic_ns()  # from one clock to the other

        def at(seconds: float) -> int:
            return int(seconds * 1e9) + off

        end = account.began + account.seconds
        span = tracer.start_span(
            f"{account.method} {account.route}",
            context_of(account.trace),  # the client's, where it sent one
            SpanKind.SERVER,
            _about(account),
            start_time=at(account.began),
        )
        if account.outcome == "failed" or (account.status or 0) >= 500:
            span.set_status(Status(StatusCode.ERROR, account.outcome))
        within = set_span_in_context(span)
        for name, (begin, done, facts) in _parts(account, end).items():
            tracer.start_span(name, within, attributes=facts, start_time=at(begin)).end(at(done))
        span.end(at(end))

    return told


def _about(account: Account) -> dict[str, str | int]:
    """Attributes, by OpenTelemetry's names where it has one."""
    model = account.model
    found = {
        "http.request.method": account.method,
        "http.route": account.route,
        "http.response.status_code": account.status or 499,
        "diffusion.request_id": account.id,
        "diffusion.outcome": account.outcome,
        "diffusion.key": account.key,
        "diffusion.task": account.task,
        "diffusion.n": account.n,
        "diffusion.steps": account.steps,
        "diffusion.model": model and model.name,
        "diffusion.version": model and model.version,
    }
    return {name: value for name, value in found.items() if value is not None}


def _parts(account: Account, end: float) -> dict[str, tuple[float, float, dict]]:
    """(from, to, facts) of each, in seconds of time.monotonic(): reading, waiting for a slot, drawing, and the rest, which
    is encoding and sending."""
    ticket = account.ticket
    if ticket is None:
        return {"read": (account.began, end, {})}
    submitted, drawn = ticket.submitted_at, ticket.ended_at or end
    parts = {"read": (account.began, submitted, {}), "queue": (submitted, min(ticket.started_at or drawn, drawn), {})}
    if ticket.started_at is not None:
        # what an engine's steps were shared by: how many of its answers this request had
        parts["draw"] = (ticket.started_at, drawn, {"diffusion.evaluations": ticket.asked})
    return parts | {"encode and send": (drawn, max(end, drawn), {})}
