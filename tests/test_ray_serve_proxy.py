import asyncio
import json

import pytest

from diffusion.adapters import ray_serve_proxy
from diffusion.adapters.ray_serve_proxy import Again, middlewares

BODY = [
    {"type": "http.request", "body": b"a" * 10, "more_body": True},
    {"type": "http.request", "body": b"b", "more_body": False},
]
ANSWER = [{"type": "http.response.start", "status": 200, "headers": []}, {"type": "http.response.body", "body": b"!"}]


def asked(app, said: list[dict], **scope) -> list[dict]:
    """What a client that says this is answered."""
    coming, answers = iter(said), []

    async def receive() -> dict:
        return next(coming)

    async def send(message: dict) -> None:
        answers.append(message)

    (middleware,) = middlewares()
    assert middleware.cls is Again
    asyncio.run(middleware.cls(app)({"type": "http"} | scope, receive, send))
    return answers


def dying(times: int, *, begun: bool = False):
    """An application that hears a body to its end and returns without an answer, so often; then it answers."""
    heard = []

    async def app(_, receive, send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        heard.append(body)
        if len(heard) <= times:
            if begun:
                await send(ANSWER[0])
            elif message["type"] == "http.request":
                return
        if message["type"] == "http.disconnect":
            return
        for answer in ANSWER[begun:]:
            await send(answer)

    return app, heard


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_request_that_was_not_answered_is_asked_again_with_its_whole_body(times):
    app, heard = dying(times)
    assert asked(app, BODY) == ANSWER
    assert heard == [b"a" * 10 + b"b"] * (times + 1)


def test_one_that_is_never_answered_is_told_so():
    app, heard = dying(3)
    start, body = asked(app, BODY)
    assert start["status"] == 503
    assert (b"retry-after", b"2") in start["headers"]
    assert json.loads(body["body"])["error"]["type"] == "server_error"
    assert len(heard) == 3


def test_one_that_was_answered_in_part_is_not():
    app, heard = dying(1, begun=True)
    asked(app, BODY)
    assert len(heard) == 1


def test_who_left_is_not_answered():
    app, heard = dying(5)
    assert asked(app, [BODY[0], {"type": "http.disconnect"}]) == []
    assert len(heard) == 1


def test_a_body_too_large_to_keep_is_asked_for_once(monkeypatch):
    monkeypatch.setattr(ray_serve_proxy, "_KEPT_BYTES", 10)
    app, heard = dying(1)
    assert asked(app, BODY)[0]["status"] == 503
    assert len(heard) == 1


@pytest.mark.parametrize(("status", "kind", "told"), [(404, b"text/plain", 503), (404, b"application/json", 404)])
def test_the_proxys_own_404_says_that_nothing_is_served_and_the_endpoints_stays(status, kind, told):
    async def app(_, receive, send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"{}"})

    start, body = asked(app, BODY)
    assert start["status"] == told
    assert ("error" in json.loads(body["body"])) == (told == 503)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_nobody_steers_the_proxy_and_an_id_is_sane(kind):
    came = []

    async def app(scope, receive, send) -> None:
        came.extend(scope["headers"])
        await send(ANSWER[0])

    passed = [(b"host", b"localhost"), (b"x-request-id", b"mine"), (b"traceparent", b"\xff")]
    dropped = [
        (b"x-request-timeout-seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"X-Session-ID", b"\xff"),
        (b"x_session_id", b"\xff"),
        (b"serve-multiplexed-model-id", b"\xff"),
        (b"x-request-id", b"\xff"),
        (b"x-request-id", b"a\x1b[31m"),
        (b"x-request-id", b"a" * 129),
    ]
    asked(app, BODY, type=kind, headers=[*passed, *dropped])
    assert came == passed
