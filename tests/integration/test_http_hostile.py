"""What nobody sends in good faith, by hand on a real socket: each is answered with a sentence, costs little, and leaves the
others' pictures as they are."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from diffusion.adapters.http import bodies
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from tests.integration.test_http import LIMITS, URL, idle, served
from tests.integration.test_http_reworks import PICTURE
from tests.random_bundle import random_bundle

GOOD = {"label": "cat", "seed": 5, "steps": 2}
FORM = "multipart/form-data; boundary=b"


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with served(engine, replica="r") as client:
        yield client


@pytest.fixture
def as_before(client: httpx.Client) -> Iterator[None]:
    before = client.post(URL, json=GOOD).json()["data"]
    yield
    assert client.post(URL, json=GOOD).json()["data"] == before


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def head(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: localhost", *headers, "", "")).encode()


def exchanged(client: httpx.Client, data: bytes) -> tuple[int, dict | None]:
    """The status, and the error where it is one of ours.  Bytes that come after the answer are not sent."""
    with connected(client) as connection:
        try:
            for start in range(0, len(data), 65_536):
                connection.sendall(data[start : start + 65_536])
        except ConnectionError:
            pass
        answer = connection.recv(65_536)
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(65_536)
        headers, _, body = answer.partition(b"\r\n\r\n")
        while b"application/json" in headers and body.count(b"}") < 2:
            body += connection.recv(65_536)
    error = json.loads(body)["error"] if b"application/json" in headers else None
    return int(headers.split()[1]), error


def part(name: bytes, value: bytes, *, more: bytes = b"", file: bytes | None = None) -> bytes:
    named = b'; filename="' + file + b'"' if file is not None else b""
    return (
        b'--b\r\nContent-Disposition: form-data; name="'
        + name
        + b'"'
        + named
        + b"\r\n"
        + more
        + b"\r\n"
        + value
        + b"\r\n"
    )


IMAGE = part(b"image", PICTURE, file=b"a.png")
FORMS = {
    "a hundred thousand fields": (b"".join(part(b"f%d" % i, b"1") for i in range(100_000)), 400, "Too many fields"),
    "a thousand files": (b"".join(part(b"f%d" % i, b"1", file=b"x") for i in range(1_000)), 400, "Too many files"),
    "a field twice": (part(b"seed", b"1") * 2 + IMAGE, 422, "twice"),
    "a file twice, in two spellings": (IMAGE + part(b"image[]", PICTURE, file=b"b.png"), 422, "twice"),
    "a name in Polish": (part("łabel".encode(), b"cat") + IMAGE, 422, "did you mean 'label'"),
    "a null byte in a name": (part(b"a\0b", b"1") + IMAGE, 422, "unknown field 'a\\x00b'"),
    "a name of a megabyte": (part(b"n" * 2**20, b"1") + IMAGE, 400, "no form"),
    "a field of a megabyte": (part(b"user", b"n" * 2**20) + IMAGE, 400, "64KB"),
    "a part with many headers": (part(b"user", b"1", more=b"X: y\r\n" * 100_000) + IMAGE, 400, "no form"),
    "no part's name": (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + IMAGE, 400, '"name" must be provided'),
    "an infinite number": (part(b"strength", b"1e999") + IMAGE, 422, "no finite number"),
    "markup as a picture": (part(b"image", b"<svg onload='alert(1)'/>", file=b"a.png"), 422, "none of the formats"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, client: httpx.Client, as_before: None) -> None:
    body, status, said = FORMS[name]
    body += b"--b--\r\n"
    sent = head("/v1/images/variations", f"Content-Type: {FORM}", f"Content-Length: {len(body)}") + body
    got, error = exchanged(client, sent)
    assert got == status
    assert said in error["message"]


JSON = "Content-Type: application/json"
REQUESTS = {
    "two lengths": (head(URL, JSON, "Content-Length: 2", "Content-Length: 3") + b"{}", 400),
    "a length and chunks": (
        head(URL, JSON, "Content-Length: 2", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        400,
    ),
    "many chunks of a byte": (head(URL, JSON, "Transfer-Encoding: chunked") + b"1\r\n \r\n" * 70_000, 413),
    "a null byte in a header": (head(URL, JSON, "X-Request-ID: a\0b"), 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100 + b"\r\n\r\n", 400),
    "another's name by another spelling of the path": (
        head("/%761/images/generations", JSON, "Content-Length: 2").replace(b"localhost", b"evil") + b"{}",
        403,
    ),
    "two names": (head(URL, JSON, "Content-Length: 2").replace(b"localhost", b"evil\r\nHost: localhost") + b"{}", 403),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(name: str, client: httpx.Client, as_before: None) -> None:
    sent, status = REQUESTS[name]
    assert exchanged(client, sent)[0] == status


def test_a_file_name_leads_nowhere(client: httpx.Client, tmp_path: Path) -> None:
    target = tmp_path / "evil.png"
    files = {"image": (f"../../../../../../{target}", PICTURE)}
    assert client.post("/v1/images/variations", files=files, data={"steps": "4"}).status_code == 200
    assert not target.exists()


def test_a_body_that_never_ends_is_408_and_gives_its_place_back(one_thread: None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_S", 0.5)
    access = Access(keys=tmp_path / "keys.json")
    bearer = {"Authorization": f"Bearer {add(access.keys, 'slow', concurrency=1)}"}
    with served(Engine(random_bundle(), slots=2), access=access) as client:
        for path, kind, start in ((URL, JSON, b"{"), ("/v1/images/edits", f"Content-Type: {FORM}", b"--b\r\n")):
            key = f"Authorization: {bearer['Authorization']}"
            status, error = exchanged(client, head(path, key, kind, "Content-Length: 1000") + start)
            assert (status, error["type"]) == (408, "timeout_error")
            assert client.post(URL, json=GOOD, headers=bearer).status_code == 200


def test_a_client_that_leaves_within_its_body_is_no_failure_of_ours(client: httpx.Client, engine: Engine) -> None:
    def told() -> dict[str, float]:
        lines = (line.rpartition(" ") for line in client.get("/metrics").text.splitlines() if line[0] != "#")
        return {name: float(number) for name, _, number in lines}

    before, cancelled = told(), 'diffusion_cancelled_total{replica="r"}'
    with connected(client) as connection:
        connection.sendall(head(URL, JSON, "Content-Length: 1000") + b"{")
        time.sleep(0.1)
    deadline = time.monotonic() + 20
    while (after := told())[cancelled] == before.get(cancelled, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after[cancelled] == before.get(cancelled, 0) + 1
    assert not [name for name in after if 'reason="failed"' in name]
    assert idle(engine)
