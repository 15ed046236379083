"""pip-audit as `make audit` runs it, against a database of advisories that knows one, in OSV's format."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CalledProcessError

import pytest

from infra.requirements import audit

ADVISORY = {
    "id": "PYSEC-2999-1",
    "modified": "2999-01-01T00:00:00Z",
    "summary": "made for this test",
    "affected": [
        {
            "package": {"name": "jinja2", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


class _Database(BaseHTTPRequestHandler):
    known: tuple[str, ...] = ()
    asked: list[str]

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = question["package"].get("name", "").lower()
        self.asked.append(name)
        body = json.dumps({"vulns": [ADVISORY]} if name in self.known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def database() -> Iterator[tuple[str, type[_Database]]]:
    handler = type("Database", (_Database,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query", handler
        server.shutdown()


def test_what_is_known_is_told_and_every_pin_is_asked_for(
    database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        audit.environment()
    except (CalledProcessError, OSError) as error:
        pytest.skip(f"pip-audit cannot be installed: {error}")
    url, handler = database
    lock = tmp_path / "requirements.lock"
    lock.write_text("Jinja2==3.1.6\nidna==3.20\n")
    assert audit.audit(lock, url) == 0
    assert {"jinja2", "idna"} <= set(handler.asked)
    handler.known = ("jinja2",)
    assert audit.audit(lock, url) == 1
    said = "".join(capfd.readouterr())
    assert "PYSEC-2999-1" in said
    assert "99.0" in said
    monkeypatch.setitem(audit.AS_IS, "PYSEC-2999-1", "made for this test")
    assert audit.audit(lock, url) == 0
