"""The HTTP application on a real server and a real socket."""

import base64
import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion.adapters.http import MAX_BODY_BYTES, create_app
from diffusion.data.images import decode_png
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import read_receipt
from diffusion.serving.request import GenerateRequest
from diffusion.store.refs import ModelRef
from tests.random_bundle import CLASSES, random_bundle, reading_bundle, shaped_bundle
from tests.running_engine import shelved

URL = "/v1/images/generations"
MODEL = ModelRef(
    uri="memory",
    digest="5" * 64,
    name="tiny",
    version="3",
    aliases=(),
    run_digest="1" * 64,
    dataset_digest="2" * 64,
)
LIMITS = ServeRecipe(slots=4, queue=8, max_n=6, max_steps=1000, timeout_s=900)  # on a busy machine


@contextmanager
def served(engine: Engine, limits: ServeRecipe = LIMITS, **given) -> Iterator[httpx.Client]:
    """The application on a free loopback port, and a client for it."""
    with shelved(engine, MODEL) as shelf, answering(create_app(shelf, limits, **given)) as client:
        yield client


@contextmanager
def answering(app: FastAPI) -> Iterator[httpx.Client]:
    """Any application there, and a client for it."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def client(engine) -> Iterator[httpx.Client]:
    with served(engine) as client:
        yield client


def idle(engine: Engine, within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while any(engine.load()[key] for key in ("drawing", "waiting")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(engine.load()[key] for key in ("drawing", "waiting"))


def error_of(answer: httpx.Response) -> dict:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "allowed"}
    assert "Traceback" not in answer.text
    return body["error"]


def test_pictures_with_their_receipts(client, engine):
    answer = client.post(URL, json={"label": "cat", "n": 3, "seed": 7, "sampler": "ddim", "steps": 4, "guidance": 2})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model"], body["version"], body["seed"], len(body["data"])) == ("tiny", "3", 7, 3)
    request = GenerateRequest(label="cat", n=3, seed=7, sampler="ddim", steps=4, guidance=2)
    for i, (item, expected) in enumerate(zip(body["data"], engine.generate([request])[0], strict=True)):
        png = base64.b64decode(item["b64_json"])
        assert np.array_equal(decode_png(png), expected)
        receipt = read_receipt(png)
        assert receipt.model_dump(mode="json") == item["receipt"]
        assert (receipt.image, receipt.seed, receipt.sampler, receipt.version) == (i, 7, "ddim", "3")
    assert answer.headers["x-diffusion-bundle-digest"] == "5" * 64


def test_a_picture_has_the_size_that_is_asked_for_whatever_is_drawn_beside_it(one_thread):
    engine = Engine(shaped_bundle(), slots=4)
    asked = [{"label": "cat", "seed": 3, "n": 2, "size": size} for size in ("24x8", "16x16", "8x24", None)]
    with served(engine) as client, ThreadPoolExecutor(4) as pool:
        answers = [answer.json() for answer in pool.map(lambda body: client.post(URL, json=body), asked)]
        card = client.get("/v1/models").json()["data"][0]
        wrong = client.post(URL, json={"label": "cat", "size": "8x8"})
        for no_size in ("16", "100000x100000", "9" * 5_000, " 16x16", "", 16, [16, 16], True):
            refused = client.post(URL, json={"label": "cat", "size": no_size})
            assert (refused.status_code, error_of(refused)["param"]) == (422, "size"), no_size
    alone = Engine(shaped_bundle(), slots=1)
    for body, answer in zip(asked, answers, strict=True):
        for item, expected in zip(answer["data"], alone.generate([GenerateRequest(**body)])[0], strict=True):
            assert np.array_equal(decode_png(base64.b64decode(item["b64_json"])), expected)
            assert item["receipt"]["size"] == (body["size"] or "16x16")
    assert (wrong.status_code, error_of(wrong)["allowed"]) == (422, card["sizes"])
    assert card["sizes"] == ["8x24", "16x16", "24x8"]


def test_a_bare_png_by_format_or_by_accept(client):
    body = {"class": CLASSES[2], "seed": 1}
    one = client.post(URL, json={**body, "response_format": "png"})
    two = client.post(URL, json=body, headers={"Accept": "image/png"})
    any_picture = client.post(URL, json=body, headers={"Accept": "image/*"})
    assert any_picture.content == two.content
    assert one.headers["content-type"] == two.headers["content-type"] == "image/png"
    assert one.content == two.content
    assert read_receipt(one.content).label == CLASSES[2]
    assert one.headers["x-diffusion-label"] == "Stra%C3%9Fe%20%26%20Co"
    both = client.post(URL, json={**body, "response_format": "b64_json"}, headers={"Accept": "image/png"})
    assert base64.b64decode(both.json()["data"][0]["b64_json"]) == one.content


def test_an_empty_request_is_one_picture_of_a_stated_seed(client):
    first = client.post(URL, json={}).json()
    again = client.post(URL, json={"seed": first["seed"]}).json()
    assert again["data"] == first["data"]


def test_a_whole_number_is_one_however_it_is_written(client):
    exact = client.post(URL, json={"label": "cat", "seed": 3, "n": 1, "steps": 2}).json()
    spelt = client.post(URL, json={"label": "cat", "seed": 3.0, "n": 1.0, "steps": 2e0}).json()
    assert spelt["data"] == exact["data"]
    assert error_of(client.post(URL, json={"seed": 1.5}))["param"] == "seed"


def test_concurrent_requests_get_the_bytes_they_get_alone(client):
    bodies = [
        {"label": "cat", "seed": 1, "n": 2},
        {"label": "dog", "seed": 1, "sampler": "ddim", "steps": 9},
        {"seed": 4, "sampler": "dpmpp_2m"},
        {"label": "cat", "seed": 5, "guidance": 4, "steps": 3},
    ]
    alone = [client.post(URL, json=body).json()["data"] for body in bodies]
    wanted = [i for i in range(len(bodies)) for _ in range(4)]
    random.Random(1).shuffle(wanted)

    def ask(i: int) -> list:
        while (answer := client.post(URL, json=bodies[i])).status_code == 503:
            time.sleep(0.05)
        return answer.json()["data"]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, wanted)) == [alone[i] for i in wanted]


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"label": "cats"}, 422, "label", "did you mean 'cat'"),
        ({"n": 7}, 422, "n", "1 to 6"),
        ({"n": "1"}, 422, "n", "'1'"),
        ({"seed": -1}, 422, "seed", "0 to 4294967295"),
        ({"steps": 1001}, 422, "steps", "2 to 1000"),
        ({"guidance": 1e308}, 422, "guidance", "0 to 20"),
        ({"prompt": "a cat"}, 422, "prompt", "this model reads no prompts"),
        ({"prompts": "a cat"}, 422, "prompts", "unknown field 'prompts' (did you mean 'prompt'?)"),
        ({"response_format": "url"}, 422, "response_format", "b64_json, png"),
        ({"response_format": "png", "n": 2}, 422, "n", "bare picture is one"),
        ({"model": "huge"}, 404, "model", "'tiny'"),
        ({"x" * 1000: 1}, 422, "x" * 80, "unknown field"),
    ],
)
def test_wrong_fields(client, body, status, param, said):
    answer = client.post(URL, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (status, param)
    assert said in error["message"]
    assert error["allowed"] is not None


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"seed": 1, "seed": 2}', "application/json", 422),
        (b'{"\\ud800": 1, "\\ud800": 2}', "application/json", 422),
        (b"[]", "application/json", 400),
        (b'{"\\ud800": 1}', "application/json", 422),
        (b'{"label": "\\ud800"}', "application/json", 422),
        (b'{"guidance": NaN}', "application/json", 400),
        (b"\xff\xfe{", "application/json", 400),
        ('{"label": "cat"}'.encode("utf-16"), "application/json", 400),
        (b"null", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b'{"seed": ' + b"9" * 20_000 + b"}", "application/json", 400),
        (b"label=cat", "application/x-www-form-urlencoded", 415),
        (b" " * (MAX_BODY_BYTES + 1), "application/json", 413),
    ],
)
def test_wrong_bodies(client, content, kind, status):
    answer = client.post(URL, content=content, headers={"Content-Type": kind})
    error_of(answer)
    assert answer.status_code == status


def test_wrong_paths_and_methods(client):
    assert client.get("/nowhere").status_code == 404
    error_of(client.get("/nowhere"))
    error_of(client.get("/v1/models/"))
    answer = client.get(URL)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    error_of(answer)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(
            ["label", "class", "prompt", "n", "seed", "steps", "sampler", "guidance", "response_format", "model", "x"]
        ),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()) | st.just("cat"),
    )
)
def test_no_body_makes_the_server_fail(client, body):
    body = {**body, "steps": body["steps"]} if isinstance(body.get("steps"), str) else {**body, "steps": 2}
    answer = client.post(URL, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404, 422)
    if answer.status_code != 200:
        error_of(answer)


def test_overload_is_503_with_retry_after(client, engine, monkeypatch):
    gate, inner = threading.Event(), engine.bundle.denoiser.forward
    body = {"label": "cat", "n": 6, "steps": 2, "seed": 0}
    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patch:
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: gate.wait(60) and inner(*a, **k))
        accepted = [pool.submit(client.post, URL, json=body) for _ in range(2)]  # 4 slots and 8 places in the queue
        deadline = time.monotonic() + 30
        while sum(engine.load()[key] for key in ("drawing", "waiting")) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = client.post(URL, json=body)
        gate.set()
        assert [answer.result().status_code for answer in accepted] == [200, 200]
    assert refused.status_code == 503
    assert error_of(refused)["type"] == "overloaded_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 600
    assert idle(engine)
    assert client.post(URL, json=body).status_code == 200


def test_a_client_that_leaves_frees_its_slots(client, engine):
    body = json.dumps({"label": "cat", "n": 6, "steps": 1000, "seed": 0}).encode()
    address = (client.base_url.host, client.base_url.port)
    with socket.create_connection(address) as connection:
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while engine.load()["drawing"] < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.load()["drawing"] == 4
    began = time.monotonic()
    assert idle(engine), "the pictures of a client that has gone are still being drawn"
    assert time.monotonic() - began < 15


def test_past_the_deadline_is_504_and_what_would_be_is_refused_before(client, engine, monkeypatch):
    inner, body = engine.bundle.denoiser.forward, {"label": "cat", "n": 4, "steps": 5, "seed": 0}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "timeout_s", 0.5)
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: time.sleep(0.3) or inner(*a, **k))
        answer = client.post(URL, json=body)  # nobody could foresee that
    assert answer.status_code == 504
    assert error_of(answer)["type"] == "timeout_error"
    monkeypatch.setattr(engine, "timeout_s", 0.01)
    answer = client.post(URL, json=body | {"steps": 1000})
    assert answer.status_code == 422
    assert error_of(answer)["param"] == "timeout"
    assert error_of(answer)["allowed"]["minimum"] >= 1


def test_the_model_card_says_what_may_be_asked(client):
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["version"], card["bundle_digest"]) == ("tiny", "3", "5" * 64)
    assert card["classes"] == list(CLASSES)
    assert card["prompts"] is False
    assert card["limits"]["max_n"] == LIMITS.max_n
    assert card["guidance_kinds"] == ["classifier_free"]
    assert card["defaults"] == {"sampler": "heun", "steps": 5, "guidance": 1.5, "guidance_kind": "classifier_free"}
    body = {"label": card["classes"][0], "n": card["limits"]["max_n"], **card["defaults"]}
    assert client.post(URL, json=body).status_code == 200


def test_a_model_that_reads_prompts_says_so_and_draws_from_them():
    engine = Engine(reading_bundle(), slots=2)
    with served(engine) as client:
        assert client.get("/v1/models").json()["data"][0]["prompts"] is True
        body = {"prompt": "un drapeau très rouge", "seed": 7}
        answer = client.post(URL, json={**body, "response_format": "png"})
        assert answer.status_code == 200
        assert read_receipt(answer.content).prompt == body["prompt"]
        assert answer.headers["x-diffusion-prompt"] == "un%20drapeau%20tr%C3%A8s%20rouge"
        assert np.array_equal(decode_png(answer.content), engine.generate([GenerateRequest(**body)])[0][0])
        both = client.post(URL, json={**body, "label": "cat"}).json()["data"][0]
        assert (both["receipt"]["label"], both["receipt"]["prompt"]) == ("cat", body["prompt"])
        for wrong, said in (
            (" ", "has words"),
            ("x" * 301, "at most 300"),
            ("a\nb", "printable"),
            (7, "it is no text"),
        ):
            answer = client.post(URL, json={"prompt": wrong})
            error = error_of(answer)
            assert (answer.status_code, error["param"]) == (422, "prompt")
            assert said in error["message"]


def test_health_shows_the_self_test_and_a_stopped_engine():
    engine = Engine(random_bundle(), slots=2)
    with served(engine) as client:
        state = client.get("/healthz").json()
        assert state["status"] == "ok"
        assert state["self_test_sha256"] == engine.self_test()
        engine.stop()
        assert client.get("/healthz").status_code == client.head("/healthz").status_code == 503
        answer = client.post(URL, json={"label": "cat"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_failure_inside_tells_nothing_of_the_inside(client, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: 1 / 0)
        answer = client.post(URL, json={"label": "cat"})
    assert answer.status_code == 500
    assert error_of(answer)["type"] == "server_error"
    assert "division" not in answer.text
    assert client.post(URL, json={"label": "cat", "steps": 2}).status_code == 200


def test_every_answer_carries_the_secure_headers(client):
    for answer in (client.get("/"), client.get("/healthz"), client.get("/nowhere"), client.post(URL, json={"n": 0})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"


def test_the_page_and_the_schema(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    parts = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
    assert parts == ["page/page.css", "page/page.js"]
    for part, kind in zip(parts, ("text/css", "text/javascript"), strict=True):
        assert client.get(f"/{part}").headers["content-type"] == f"{kind}; charset=utf-8"
    for absent in ("page/page.py", "page/..%2f__init__.py", "page/", "page/page.html/"):
        assert client.get(f"/{absent}").status_code == 404
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths[URL]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["label"]["enum"] == [*CLASSES, None]
    assert set(schema["properties"]) >= {
        "label",
        "n",
        "size",
        "seed",
        "steps",
        "sampler",
        "guidance",
        "response_format",
        "model",
    }
    assert schema["additionalProperties"] is False
