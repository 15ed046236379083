"""Requests have ids and leave a line each, which tells where the time went and nothing that is the client's own."""

import base64
import json
import logging
import logging.handlers
import queue
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from diffusion.adapters.http import MAX_BODY_BYTES, seen
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from tests.integration.test_http import LIMITS, URL, error_of, idle, served
from tests.integration.test_http_reworks import MASK, PICTURE
from tests.random_bundle import reading_bundle

Line = Callable[..., dict]


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(reading_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def secret(access: Access) -> str:
    return add(access.keys, "web")


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Access:
    return Access(keys=tmp_path_factory.mktemp("home") / "keys.json")


@pytest.fixture(scope="module")
def client(engine: Engine, access: Access, secret: str) -> Iterator[httpx.Client]:
    with served(engine, access=access) as client:
        client.headers["Authorization"] = f"Bearer {secret}"
        yield client


@pytest.fixture
def raw() -> Iterator["queue.Queue[logging.LogRecord]"]:
    """The log's lines, as they come."""
    came: queue.Queue = queue.Queue()
    handler, before = logging.handlers.QueueHandler(came), seen.log.level
    seen.log.addHandler(handler)
    seen.log.setLevel(logging.INFO)
    yield came
    seen.log.removeHandler(handler)
    seen.log.setLevel(before)


@pytest.fixture
def line(raw) -> Line:
    """The only line there is."""

    def only() -> dict:
        found = json.loads(raw.get(timeout=20).getMessage())
        assert raw.empty()
        return found

    return only


@pytest.mark.parametrize("sane", ["a", "x" * 128, "0af7651916cd43dd-8448eb211c80319c", "a b\"'{}%s"])
def test_a_sane_id_is_kept(client: httpx.Client, line: Line, sane: str) -> None:
    answer = client.get("/healthz", headers={"X-Request-ID": sane})
    assert answer.headers["x-request-id"] == line()["id"] == sane


@pytest.mark.parametrize("mad", [None, b"", b"x" * 129, b"\xff\xfe", "é".encode(), b"a\tb", b"\x1b[31m"])
def test_another_is_replaced(client: httpx.Client, line: Line, mad: bytes | None) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        header = b"" if mad is None else b"X-Request-ID: " + mad + b"\r\n"
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + header + b"\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).lower()
    if b"400 bad request" in answer[:40]:
        return  # the server's own reader of HTTP takes no such header
    made = line()["id"]
    assert f"x-request-id: {made}\r\n".encode() in answer
    assert len(made) == 32
    assert int(made, 16)


def test_every_answer_and_error_has_the_id_and_a_line(
    client: httpx.Client, line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    post, body = ("POST", URL), {"label": "cat", "steps": 2}
    too_long = b" " * (MAX_BODY_BYTES + 1)
    json_type = {"Content-Type": "application/json"}
    cases = [
        (*post, {"json": body}, 200, "done"),
        (*post, {"json": body | {"stream": True}}, 200, "done"),
        (*post, {"json": body | {"n": 0}}, 422, "invalid"),
        (*post, {"content": b"{", "headers": json_type}, 400, "invalid"),
        (*post, {"content": too_long, "headers": json_type}, 413, "size"),
        (*post, {"json": body, "headers": {"Authorization": "Bearer dk-no"}}, 401, "key"),
        ("GET", URL, {}, 405, "invalid"),
        ("GET", "/v1/secret-of-a-client", {}, 404, "invalid"),
        ("GET", "/", {}, 200, "done"),
    ]
    for i, (method, path, sent, status, outcome) in enumerate(cases):
        sent["headers"] = sent.get("headers", {}) | {"X-Request-ID": f"case-{i}"}
        answer, left = client.request(method, path, **sent), line()
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, f"case-{i}"), path
        assert (left["id"], left["status"], left["outcome"], left["method"]) == (f"case-{i}", status, outcome, method)
        assert left["route"] == ("other" if "secret" in path else path)
        assert left.get("key") == (None if status == 401 or path == "/" else "web")
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr("diffusion.adapters.http.app.cards", lambda *_: 1 / 0)
        answer = client.get("/v1/models", headers={"X-Request-ID": "a-defect"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "a-defect")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert error_of(answer)["type"] == "server_error"
    assert (line()["outcome"], "request a-defect failed: division by zero" in caplog.text) == ("failed", True)


def test_a_line_says_where_the_time_went_and_nothing_of_the_clients_own(client, raw, secret) -> None:
    prompt = "an unmistakable prompt"
    began = time.monotonic()
    drawn = client.post(URL, json={"prompt": prompt, "n": 3, "steps": 7, "seed": 12345678})
    files = {"image": ("p.png", PICTURE), "mask": ("m.png", MASK)}
    edited = client.post("/v1/images/edits", files=files, data={"prompt": prompt, "steps": "3"})
    wrong = client.post(URL, json={"prompt": f"{prompt}\n", "unknown_" + prompt: 1})
    taken = time.monotonic() - began
    texts = [raw.get(timeout=20).getMessage() for _ in range(3)]
    assert [answer.status_code for answer in (drawn, edited, wrong)] == [200, 200, 422]
    for text in texts:
        for private in (prompt, secret, secret[3:], "12345678", base64.b64encode(PICTURE).decode()[:20], "p.png"):
            assert private not in text
    first, second, third = map(json.loads, texts)
    assert (first["task"], first["n"], first["steps"], first["key"]) == ("generation", 3, 7, "web")
    assert (second["task"], second["n"], second["steps"]) == ("inpainting", 1, 3)
    assert {"task", "n", "waited_s", "drew_s"} & set(third) == set()
    for each in (first, second):
        assert min(each["waited_s"], each["drew_s"]) >= 0
        assert 0 < each["waited_s"] + each["drew_s"] <= each["seconds"] + 0.001 <= taken + 0.002  # they are rounded


def test_a_client_that_leaves_is_told_of_as_cancelled(client: httpx.Client, engine: Engine, line: Line) -> None:
    body = json.dumps({"label": "cat", "n": 6, "steps": 1000, "stream": True}).encode()
    head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {client.headers['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while engine.load()["drawing"] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    left = line()
    assert (left["outcome"], left["n"], left["steps"]) == ("cancelled", 6, 1000)
    assert idle(engine)


def test_openais_client_shows_the_id(client: httpx.Client, secret: str, tmp_path: Path) -> None:
    with OpenAI(base_url=f"{client.base_url}/v1", api_key=secret, max_retries=0) as openai:
        answer = openai.images.generate(
            prompt="cat", extra_body={"steps": 2}, extra_headers={"X-Request-ID": "of-openais-client"}
        )
    assert answer._request_id == "of-openais-client"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """What lines are written to."""
    before = seen.log.handlers, seen.log.propagate, seen.log.level
    seen.write_to(tmp_path / "logs" / "requests.jsonl")
    yield tmp_path / "logs" / "requests.jsonl"
    seen.log.handlers[0].close()
    seen.log.handlers, seen.log.propagate = before[:2]
    seen.log.setLevel(before[2])


def test_a_line_that_cannot_be_written_harms_no_request_and_no_later_line(client, file, caplog) -> None:
    def ask(name: str, lost: str | None = None) -> None:
        """lost: why there will be no line."""
        assert client.get("/healthz", headers={"X-Request-ID": name}).status_code == 200
        deadline, found = time.monotonic() + 20, False
        while not found and time.monotonic() < deadline:
            found = lost in caplog.text if lost else file.is_file() and f'"id": "{name}"' in file.read_text()
            time.sleep(0.01)
        assert found, caplog.text

    ask("first")
    shutil.rmtree(file.parent)
    ask("after its folder was deleted")
    file.unlink()
    file.symlink_to("/dev/full")
    ask("on a full disk", lost="No space left on device")
    file.unlink()
    file.mkdir()
    ask("where another thing stands", lost="Is a directory")
    file.rmdir()
    ask("last")
