"""S3: what a server may answer beside what the one of tests/integration does, and what becomes of it."""

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffusion.store.retry import Patience, retries
from diffusion.store.s3 import S3Prefix
from diffusion.store.storage import StorageRefused, StorageUnavailable

QUICK = Patience(attempts=3, first_s=0.001)


Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


class Canned(ThreadingHTTPServer):
    """Gives one answer to everything, or what a function of the request says; HEAD gets it without the body."""

    daemon_threads = True
    answer: Answer | Callable[[BaseHTTPRequestHandler], Answer] = (200, {}, b"")
    asked = connections = 0

    def process_request(self, *connection: object) -> None:
        self.connections += 1
        super().process_request(*connection)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.answer
        status, headers, body = answer(self) if callable(answer) else answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def running() -> Iterator[Canned]:
    with Canned(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        settings = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}", "DEFAULT_REGION": "us-east-1"}
        for name, value in {**settings, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            patch.setenv(f"AWS_{name}", value)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running: Canned) -> Canned:
    running.asked = 0
    return running


@pytest.fixture
def storage(server: Canned) -> S3Prefix:
    return S3Prefix("s3://bucket/x", patience=QUICK)


def says(status: int, code: str, extra: str = "", **headers: str) -> Answer:
    """An error as S3 writes it."""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>words</Message>{extra}</Error>'
    return status, {"Content-Type": "application/xml", **headers}, body.encode()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(400, "ExpiredToken"), r"the session has expired: log in again"),
        (says(400, "InvalidToken"), r"unset AWS_SESSION_TOKEN"),
        (says(403, "InvalidAccessKeyId"), r"the key id is not known at http://127.*: set AWS_ACCESS_KEY_ID"),
        (says(400, "IllegalLocationConstraintException", "<Region>eu-west-1</Region>"), r"AWS_DEFAULT_REGION=eu-west-1$"),
        (says(403, "RequestTimeTooSkewed", Date="nonsense"), r"clock differs too much from the server's: set the clock"),
        (says(501, "NotImplemented"), r"refuses GetObject: NotImplemented \(501\) words"),
        (says(403, "AccountProblem"), r"http://127.* refuses GetObject: AccountProblem \(403\) words"),
    ],
)  # fmt: skip
def test_refusals_are_not_asked_again(server, storage, answer, words):
    server.answer, before = answer, retries()
    with pytest.raises(StorageRefused, match=rf"^s3://bucket/x/a: .*{words}"):
        storage.read("a")
    assert retries() == before
    assert server.asked == (2 if b"<Region>" in answer[2] else 1)  # boto3 asks for the bucket's region itself


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (says(429, "TooManyRequests"), "429 TooManyRequests"),
        (says(503, "SlowDown"), "503 SlowDown"),
        (says(400, "RequestTimeout"), "400 RequestTimeout"),
        (says(400, "BadDigest"), "400 BadDigest"),
        ((502, {}, b"<html>Bad gateway</html>"), "502"),
        ((404, {"Content-Type": "text/html"}, b"<html>Not found</html>"), "unreadable answer"),
        ((403, {}, b""), "unreadable answer"),
        ((200, {}, b"all of it"), "wrong answer"),
        ((206, {"Content-Range": "bytes 0-8/10", "ETag": '"1"'}, b"all of it"), "wrong answer"),
        ((206, {"Content-Range": "bytes 2-9/10", "ETag": '"1"'}, b"all of it"), "wrong answer"),
        ((200, {"Content-Range": "bytes 1-9/10", "ETag": '"1"'}, b"all of it"), "wrong answer"),
        ((206, {"Content-Range": "bytes 1-9/10", "ETag": '"1"'}, b"a part"), "wrong length"),
        ((206, {"Content-Range": "bytes 1-9/10", "ETag": '"1"'}, b"all of it, and more"), "wrong length"),
    ],
)
def test_what_may_pass_is_asked_again(server, storage, answer, kind):
    server.answer, before = answer, retries()
    with pytest.raises(StorageUnavailable, match=rf"^s3://bucket/x/a: {kind}.* \(asked 3 times"):
        storage.read("a", 1)
    assert server.asked == 3
    assert retries() - before == {kind: 2}


def test_a_proper_answer_is_taken(server, storage, tmp_path: Path):
    server.answer = (206, {"Content-Range": "bytes 1-9/10", "ETag": '"1"'}, b"all of it")
    assert storage.read("a", 1) == b"all of it"
    server.answer = (206, {"Content-Range": "bytes 0-8/9", "ETag": '"1"'}, b"all of it")
    storage.fetch("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"all of it"
    assert server.asked == 2


def test_one_connection_serves_one_read_after_another(server, storage):
    server.answer = (206, {"Content-Range": "bytes 0-8/9", "ETag": '"1"'}, b"all of it")
    storage.read("a")
    before = server.connections
    for _ in range(5):
        storage.read("a")
    assert server.connections == before


def test_a_fork_has_a_connection_of_its_own(server, storage):
    server.answer = (206, {"Content-Range": "bytes 0-8/9", "ETag": '"1"'}, b"all of it")
    storage.read("a")
    before = server.connections
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writable, storage.read("a"))
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as answer:
        assert answer.read() == b"all of it"
    os.waitpid(child, 0)
    assert server.connections == before + 1
    storage.read("a")
    assert server.connections == before + 1


def test_a_body_that_comes_without_its_length_is_counted(server, storage):
    headers = {"Content-Range": "bytes 0-8/9", "ETag": '"1"', "Transfer-Encoding": "chunked", "Content-Length": ""}
    server.answer = (206, headers, b"9\r\nall of it\r\n0\r\n\r\n")
    assert storage.read("a") == b"all of it"
    server.answer = (206, headers, b"3\r\nall\r\n0\r\n\r\n")
    with pytest.raises(StorageUnavailable, match="short body: 3 of 9 bytes came"):
        storage.read("a")


def test_a_listing_out_of_order_is_refused(server, storage):
    objects = "".join(
        f'<Contents><Key>x/{name}</Key><Size>1</Size><ETag>"1"</ETag></Contents>' for name in ("a", "c", "b")
    )
    body = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{objects}</ListBucketResult>'
    server.answer = (200, {"Content-Type": "application/xml"}, body.encode())
    walk = storage.walk()
    assert [next(walk).name, next(walk).name] == ["a", "c"]
    with pytest.raises(StorageRefused, match=r"lists 'b' after 'c'.* Use a general purpose bucket"):
        next(walk)


@pytest.mark.parametrize("whose", ["ours", "another's"])
def test_an_upload_whose_end_got_lost_is_done_if_the_object_is_ours(server, whose):
    """AWS forgets an upload that is complete: the second asking is answered "no such upload"."""
    marks, ends = [], iter([says(500, "InternalError")])
    started = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"

    def answer(request: BaseHTTPRequestHandler) -> Answer:
        if request.command == "POST" and "uploads" in request.path:
            marks.append(request.headers["x-amz-meta-upload"])
            return 200, {}, started
        if request.command == "POST":
            return next(ends, says(404, "NoSuchUpload"))
        if request.command == "PUT":
            return 200, {"ETag": '"1"'}, b""
        if request.command == "HEAD":
            return 200, {"ETag": '"2"', "x-amz-meta-upload": marks[0] if whose == "ours" else "x"}, bytes(11)
        return 204, {}, b""

    server.answer = answer
    storage = S3Prefix("s3://bucket/x", patience=QUICK, part_bytes=10)
    if whose == "ours":
        storage.put("a", bytes(11))
        marks.clear()
        with pytest.raises(StorageUnavailable, match="a has 11 bytes where 12 were sent: put it again"):
            storage.put("a", bytes(12))
    else:
        with pytest.raises(StorageUnavailable, match="the upload was removed by somebody else; put it again"):
            storage.put("a", bytes(11))


def test_no_server_is_unavailable(storage, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match=r"^s3://bucket/x/a: connection: Could not connect .* \(asked 3 times"):
        storage.read("a")
