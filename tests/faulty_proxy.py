"""A proxy in front of an S3 server (or any HTTP server) that does to answers what networks and servers do to them.

    with FaultyProxy(server.url, seed=1, rate=0.3) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        ...                      # at the end, or meanwhile:
        proxy.injected           # Counter({"reset": 12, "503": 9, ...})

Request n of the proxy's life is spoilt with probability `rate`, by one of `kinds`; both are drawn from (seed, n).  Equal
requests are spoilt at most `in_a_row` times one after another, so a client that asks once more than that always succeeds.
What is signed stays as it is: a client signs the Host that it calls, the proxy hands that on, and the server compares.
"""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = (
    "reset",  # the connection is reset before the server hears of the request
    "reset after",  # the server did it, and the connection is reset in the middle of the answer's body
    "stall",  # no answer, no reset
    "500",
    "503",  # SlowDown
    "truncated",  # half of the announced body, then the end
    "short",  # half of the body, announced as such: all looks well
    "trickle",  # an object's second half comes byte by byte
)
FLIPPED = "flipped"  # one bit of an object is another: only who knows the digest can tell, so it is not among KINDS

_XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'
_CODES = {"500": (500, "InternalError"), "503": (503, "SlowDown")}


class FaultyProxy:
    """Serves on a free port of 127.0.0.1 while the block lasts.  `rate` and `kinds` may be changed meanwhile."""

    def __init__(
        self,
        upstream: str,
        *,
        seed: int = 0,
        rate: float = 0.3,
        kinds: Sequence[str] = KINDS,
        in_a_row: int = 3,
        stall_s: float = 30.0,
        trickle_s: float = 0.05,
        max_body: int | None = None,  # bytes of a request that are passed on; more are answered by 413
        ahead_s: float = 0.0,  # of the time that the Date of an answer says
    ) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.seed, self.rate, self.kinds, self.in_a_row = seed, rate, tuple(kinds), in_a_row
        self.stall_s, self.trickle_s, self.max_body = stall_s, trickle_s, max_body
        self.ahead_s = ahead_s
        self.injected: Counter[str] = Counter()
        self.requests = 0
        self._row: Counter[str] = Counter()
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyProxy":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault(self, request: str) -> str | None:
        """What shall happen to the next request.  request: equal for equal requests."""
        with self._lock:
            draw = random.Random(f"{self.seed}-{self.requests}")
            self.requests += 1
            if draw.random() >= self.rate or self._row[request] >= self.in_a_row:
                del self._row[request]
                return None
            self._row[request] += 1
            return draw.choice(self.kinds)

    def count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1

    def wait(self, seconds: float) -> bool:
        """False where the proxy is closed meanwhile."""
        return not self._closing.wait(seconds)


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        upstream: http.client.HTTPConnection | None = None

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except OSError:  # the client went away
                self.close_connection = True

        def finish(self) -> None:
            if self.upstream:
                self.upstream.close()
            try:
                super().finish()
            except OSError:
                return

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if proxy.max_body is not None and len(body) > proxy.max_body:
                return self.answer(413, [], b"")
            fault = proxy.fault(f"{self.command} {self.path} {self.headers.get('Range')}")
            if fault == "reset":
                proxy.count(fault)
                return self.reset()
            if fault == "stall":
                proxy.count(fault)
                proxy.wait(proxy.stall_s)
                return self.reset()
            if fault in _CODES:
                proxy.count(fault)
                status, code = _CODES[fault]
                return self.answer(status, [("Content-Type", "application/xml")], _XML.format(code).encode())
            status, headers, answer = self.ask_upstream(body)
            self.spoil(fault, status, headers, answer)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = pass_on

        def ask_upstream(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            for fresh in (False, True):  # a kept connection may have been closed by the server meanwhile
                if self.upstream is None or fresh:
                    self.upstream = http.client.HTTPConnection(proxy.upstream, timeout=120)
                try:
                    self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        if name.lower() != "expect":  # answered by us
                            self.upstream.putheader(name, value)
                    self.upstream.endheaders(body or None)
                    answer = self.upstream.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
                except (http.client.HTTPException, ConnectionError):
                    if fresh:
                        raise
            raise AssertionError

        def spoil(self, fault: str | None, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            half = len(body) // 2
            of_objects_only = fault in (FLIPPED, "trickle") and status != 206
            if fault is None or of_objects_only or (not body and fault != "reset after"):
                return self.answer(status, headers, body)
            proxy.count(fault)
            if fault == "short":
                return self.answer(status, headers, body[:half])
            if fault == FLIPPED:
                return self.answer(status, headers, body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :])
            self.answer(status, headers, body[:half], announced=len(body))
            if fault == "trickle":
                for at in range(half, len(body)):
                    if not proxy.wait(proxy.trickle_s):
                        break
                    self.wfile.write(body[at : at + 1])
            elif fault == "reset after":
                self.reset()
            else:
                self.close_connection = True

        def answer(
            self, status: int, headers: list[tuple[str, str]], body: bytes, announced: int | None = None
        ) -> None:
            ours = {"content-length", "transfer-encoding", "connection"}
            length = next((value for name, value in headers if name.lower() == "content-length"), "0")
            if self.command != "HEAD":
                length = str(len(body) if announced is None else announced)
            lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
            lines += [f"{name}: {self.told(name, value)}" for name, value in headers if name.lower() not in ours]
            if status >= 200 and status not in (204, 304):
                lines.append(f"Content-Length: {length}")
            self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

        def told(self, name: str, value: str) -> str:
            if name.lower() != "date" or not proxy.ahead_s:
                return value
            return formatdate(parsedate_to_datetime(value).timestamp() + proxy.ahead_s, usegmt=True)

        def reset(self) -> None:
            """Close so that the client is sent RST rather than FIN."""
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def log_message(self, *_: object) -> None:
            return

    return Handler
