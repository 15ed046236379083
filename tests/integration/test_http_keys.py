"""Keys on a real server and a real socket, and with OpenAI's own client."""

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add, remove
from diffusion.serving.priority import PRIORITIES
from tests.integration.test_http import LIMITS, URL, error_of, idle, served
from tests.random_bundle import CLASSES, random_bundle

BODY = {"label": "cat", "seed": 1, "steps": 2}


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Access:
    return Access(keys=tmp_path_factory.mktemp("home") / "keys.json")


@pytest.fixture(scope="module")
def client(engine: Engine, access: Access) -> Iterator[httpx.Client]:
    with served(engine, access=access) as client:
        yield client


@pytest.fixture
def key(access: Access) -> Iterator[str]:
    yield add(access.keys, "web")
    remove(access.keys, "web")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_without_keys_nobody_needs_one_and_with_one_all_do(client: httpx.Client, access: Access) -> None:
    assert client.post(URL, json=BODY).status_code == 200
    secret = add(access.keys, "new")  # the server runs
    refused = client.post(URL, json=BODY)
    assert client.post(URL, json=BODY, headers=bearer(secret)).status_code == 200
    remove(access.keys, "new")
    assert client.post(URL, json=BODY, headers=bearer(secret)).status_code == 200
    assert (refused.status_code, error_of(refused)["type"]) == (401, "authentication_error")


@pytest.mark.parametrize(
    "sent", [{}, bearer("dk-" + "A" * 43), {"Authorization": "Bearer"}, {"Authorization": "Basic d2ViOng="}]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", URL), ("GET", "/v1/models"), ("GET", "/v1/nowhere"), ("POST", "/v1/images/edits"), ("DELETE", URL)],
)
def test_a_request_without_a_known_key_is_401(client, key, sent, method, path) -> None:
    answer = client.request(method, path, headers=sent)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    error = error_of(answer)
    assert (error["param"], error["allowed"]) == (None, None)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_and_health_stay_open(client, key) -> None:
    assert [client.get(path).status_code for path in ("/", "/healthz", "/openapi.json")] == [200, 200, 200]
    assert client.get("/v1/models", headers={"Authorization": f"bearer {key}"}).status_code == 200


def test_beyond_loopback_nobody_asks_without_a_key(one_thread: None, tmp_path: Path) -> None:
    with served(Engine(random_bundle(), slots=2), access=Access(keys=tmp_path / "keys.json", needed=True)) as client:
        assert client.post(URL, json=BODY).status_code == 401
        assert client.post(URL, json=BODY, headers=bearer(add(tmp_path / "keys.json", "web"))).status_code == 200


def test_a_request_is_as_urgent_as_its_key_or_less(client, access, engine, monkeypatch) -> None:
    keys = {priority: bearer(add(access.keys, priority, priority=priority)) for priority in PRIORITIES}
    submit, heard = engine.submit, []

    def hearing(*args, **given):
        heard.append((given["priority"], given["timeout_s"]))
        return submit(*args, **given)

    monkeypatch.setattr(engine, "submit", hearing)
    for key, said, status in (
        ("high", {}, 200),
        ("low", {}, 200),
        ("high", {"priority": "low", "timeout": 30}, 200),
        ("normal", {"priority": "high"}, 422),
        ("low", {"priority": "normal"}, 422),
        ("high", {"timeout": 0}, 422),
    ):
        assert client.post(URL, json=BODY | said, headers=keys[key]).status_code == status
    assert heard == [("high", math.inf), ("low", math.inf), ("low", 30)]
    error = client.post(URL, json=BODY | {"priority": "high"}, headers=keys["low"]).json()["error"]
    assert (error["param"], error["allowed"]) == ("priority", ["low"])


def test_a_key_that_asks_too_often_is_429_with_retry_after(client, access) -> None:
    slow = bearer(add(access.keys, "slow", rate=2))
    statuses = [client.post(URL, json=BODY, headers=slow).status_code for _ in range(2)]
    refused = client.post(URL, json=BODY, headers=slow)
    assert client.get("/v1/models", headers=slow).status_code == 200  # draws nothing
    remove(access.keys, "slow")
    assert statuses == [200, 200]
    assert (refused.status_code, error_of(refused)["type"]) == (429, "rate_limit_error")
    assert 20 <= int(refused.headers["retry-after"]) <= 30


@pytest.mark.parametrize("stream", [False, True])
def test_a_key_has_no_more_requests_at_once_than_it_may(client, engine, access, monkeypatch, stream) -> None:
    one = bearer(add(access.keys, "one", concurrency=1))
    gate, inner = threading.Event(), engine.bundle.denoiser.forward
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: gate.wait(60) and inner(*a, **k))
        first = pool.submit(client.post, URL, json=BODY | {"stream": stream}, headers=one)
        deadline = time.monotonic() + 30
        while not engine.load()["drawing"] and time.monotonic() < deadline:
            time.sleep(0.01)
        second = client.post(URL, json=BODY, headers=one)
        gate.set()
        assert first.result().status_code == 200
    assert (second.status_code, second.headers["retry-after"]) == (429, "1")
    assert idle(engine)
    assert client.post(URL, json=BODY, headers=one).status_code == 200
    remove(access.keys, "one")


def test_openais_client_with_a_key_and_with_a_wrong_one(client, access, key) -> None:
    url, slow = f"{client.base_url}/v1", add(access.keys, "slow", rate=1)
    with OpenAI(base_url=url, api_key=key, max_retries=0) as openai:
        assert openai.images.generate(prompt="cat", extra_body={"steps": 2}).data[0].b64_json
        assert openai.models.list().data[0].id == "tiny"
    wrong = OpenAI(base_url=url, api_key="dk-wrong", max_retries=0)
    with wrong, pytest.raises(AuthenticationError, match="not known here"):
        wrong.images.generate(prompt="cat")
    with OpenAI(base_url=url, api_key=slow, max_retries=0) as openai:
        openai.images.generate(prompt="cat", extra_body={"steps": 2})
        with pytest.raises(RateLimitError, match="1 times a minute"):
            openai.images.generate(prompt="cat")
    remove(access.keys, "slow")


def test_without_keys_it_answers_to_names_of_this_machine_alone(engine: Engine, tmp_path: Path) -> None:
    """A page whose own name was made to point here would else be taken for this endpoint's own."""
    with served(Engine(random_bundle(), slots=2), access=Access(keys=tmp_path / "keys.json")) as client:
        for host, status in (
            ("evil.example", 403),
            ("evil.example:7777", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost:7777", 200),
            ("127.0.0.1:1", 200),
            ("[::1]:7777", 200),
        ):
            for ask in (
                lambda host: client.get("/v1/models", headers={"Host": host}),
                lambda host: client.post(URL, json={"label": CLASSES[0], "steps": 2}, headers={"Host": host}),
            ):
                assert ask(host).status_code == status, host
        assert "make a key" in error_of(client.get("/v1/models", headers={"Host": "evil.example"}))["message"]
        assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 200  # tells nothing
        key = add(tmp_path / "keys.json", "proxy")
        assert client.get("/v1/models", headers={"Host": "evil.example", **bearer(key)}).status_code == 200
    open_to_all = Access(keys=tmp_path / "none.json", by_any_name=True)
    with served(Engine(random_bundle(), slots=2), access=open_to_all) as client:
        assert client.get("/v1/models", headers={"Host": "pictures.example"}).status_code == 200
