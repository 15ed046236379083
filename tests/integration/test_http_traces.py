"""Traces as a collector gets them: over HTTP, in OpenTelemetry's own messages."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from gzip import decompress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from diffusion.adapters.http.tracing import ENDPOINTS, tracing
from diffusion.serving.engine import Engine
from tests.integration.test_http import LIMITS, URL, served
from tests.random_bundle import random_bundle

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass
class Collector:
    """What came, and at which address."""

    url: str
    came: list[ExportTraceServiceRequest] = field(default_factory=list)

    def spans(self, wanted: int) -> list[Span]:
        """All of them, once there are so many."""
        deadline = time.monotonic() + 30
        while True:
            scopes = [scope for came in self.came for each in came.resource_spans for scope in each.scope_spans]
            found = [span for scope in scopes for span in scope.spans]
            if len(found) >= wanted or time.monotonic() > deadline:
                return found
            time.sleep(0.02)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            collector.came.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
    yield collector
    server.shutdown()
    server.server_close()
    thread.join(10)


def attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_is_a_span_with_its_parts_below_the_clients_own(collector: Collector, one_thread: None) -> None:
    began = time.time_ns()
    with served(Engine(random_bundle(), slots=LIMITS.slots)) as client:
        headers = {"traceparent": PARENT, "X-Request-ID": "mine"}
        body = {"label": "cat", "n": 2, "steps": 4, "sampler": "ddim", "seed": 1}
        assert client.post(URL, json=body, headers=headers).status_code == 200
        spans = {span.name: span for span in collector.spans(5)}
    ended = time.time_ns()
    whole = spans.pop(f"POST {URL}")
    assert list(spans) == ["read", "queue", "draw", "encode and send"]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    for part in spans.values():
        assert (part.trace_id, part.parent_span_id) == (whole.trace_id, whole.span_id)
    times = [time for part in spans.values() for time in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert times == sorted(times)
    assert began <= whole.start_time_unix_nano <= times[0] <= times[-1] <= whole.end_time_unix_nano + 1_000 <= ended
    about = attributes(whole)
    assert about.items() >= {"diffusion.request_id": "mine", "diffusion.outcome": "done", "diffusion.n": 2}.items()
    assert (about["http.route"], about["http.response.status_code"], about["diffusion.model"]) == (URL, 200, "tiny")
    assert attributes(spans["draw"])["diffusion.evaluations"] == 2 * 4
    assert not any("cat" in str(value) for value in about.values())
    resource = collector.came[0].resource_spans[0].resource
    assert {each.key: each.value.string_value for each in resource.attributes}["service.name"] == "diffusion"


def test_a_refusal_is_a_span_and_a_failure_an_error(collector: Collector, one_thread: None, monkeypatch) -> None:
    engine = Engine(random_bundle(), slots=LIMITS.slots)
    with served(engine) as client:
        assert client.post(URL, json={"label": "bird"}).status_code == 422
        monkeypatch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: 1 / 0)
        assert client.post(URL, json={"label": "cat", "steps": 2}).status_code == 500
        spans = [span for span in collector.spans(7) if span.name.startswith("POST")]
    assert [attributes(span)["diffusion.outcome"] for span in spans] == ["invalid", "failed"]
    assert [span.status.code for span in spans] == [0, 2]


def test_without_a_collector_there_is_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    assert tracing({}) is None
    assert tracing(dict.fromkeys(ENDPOINTS, "")) is None
    assert not caplog.records


def test_without_its_package_the_log_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert tracing({ENDPOINTS[1]: "http://127.0.0.1:1"}) is None
    assert "pip install" in caplog.text
