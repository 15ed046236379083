"""A site hears of failures and verdicts: by a webhook or a command, without secrets, and never at the run's expense."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from flows import notify
from flows.notify import VARIABLE


class Heard(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.heard.append((self.path, json.loads(self.rfile.read(length))))
        if self.path == "/slow":
            self.server.ended.wait(20)
        self.send_response({"/moved": 302, "/broken": 500}.get(self.path, 204))
        if self.path == "/moved":
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Heard) as server:
        server.heard, server.ended = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()


def test_nobody_is_told_where_nobody_is_named(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not notify.notify("failed", "it failed")


def test_a_webhook_is_told_in_json(server, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"{server.url}/hook")
    assert notify.notify("refused", "demo version 3 is refused", name="demo", reasons=["blurred", "slow"])
    ((path, told),) = server.heard
    assert path == "/hook"
    assert told == {
        "event": "refused",
        "text": "demo version 3 is refused",
        "facts": {"name": "demo", "reasons": ["blurred", "slow"]},
    }


@pytest.mark.parametrize(("path", "why"), [("moved", "Found"), ("broken", "Internal Server Error")])
def test_who_answers_otherwise_has_not_heard_and_nothing_fails(server, monkeypatch, capsys, path, why):
    monkeypatch.setenv(VARIABLE, f"{server.url}/{path}")
    assert not notify.notify("failed", "it failed")
    assert [heard[0] for heard in server.heard] == [f"/{path}"]  # it is sent nowhere else
    said = capsys.readouterr().out
    assert f"nobody was told of it by {VARIABLE}: " in said
    assert why in said
    assert server.url not in said


def test_who_does_not_answer_is_given_up(server, monkeypatch, capsys):
    monkeypatch.setattr(notify, "LIMIT_S", 0.3)
    monkeypatch.setenv(VARIABLE, f"{server.url}/slow")
    before = time.monotonic()
    assert not notify.notify("failed", "it failed")
    assert time.monotonic() - before < 15
    assert "timed out" in capsys.readouterr().out
    monkeypatch.setenv(VARIABLE, "http://127.0.0.1:1/none")
    assert not notify.notify("failed", "it failed")


def test_a_command_is_told_on_its_standard_input(tmp_path: Path, monkeypatch):
    target = tmp_path / "heard"
    monkeypatch.setenv(VARIABLE, f'{sys.executable} -c \'import sys; open("{target}", "w").write(sys.stdin.read())\'')
    assert notify.notify("promoted", "demo version 2 is the champion")
    assert json.loads(target.read_text())["event"] == "promoted"


def test_a_command_that_fails_hangs_or_is_not_there_costs_its_time_alone(monkeypatch, capsys):
    monkeypatch.setattr(notify, "LIMIT_S", 0.3)
    for command, why in (("false", "ended with 1"), ("sleep 60", "took more than"), ("no-such-thing", "No such file")):
        monkeypatch.setenv(VARIABLE, command)
        before = time.monotonic()
        assert not notify.notify("failed", "it failed")
        assert why in capsys.readouterr().out
        assert time.monotonic() - before < 15


def test_secrets_are_not_told(server, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"{server.url}/T0/B0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3tvalue")
    text = f"s3cr3tvalue at postgresql://me:pass@db/x by {server.url}/T0/B0 " + "x" * 10_000
    assert notify.notify("failed", text, reasons=["https://s3/b?token=abc&part=1"])
    ((_, told),) = server.heard
    assert told["text"].startswith("(hidden) at postgresql://me:(hidden)@db/x by (hidden) xxx")
    assert told["facts"] == {"reasons": ["https://s3/b?token=(hidden)&part=1"]}
    assert len(told["text"]) == 2_000
