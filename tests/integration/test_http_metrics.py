"""What Prometheus reads is what happened."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from diffusion.adapters.http import metrics
from diffusion.sampler import evaluations
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from diffusion.serving.lineup import Lineup
from diffusion.serving.shelf import Shelf
from tests.integration.test_http import LIMITS, MODEL, URL, served
from tests.integration.test_http_reworks import PICTURE
from tests.random_bundle import random_bundle
from tests.running_engine import OfEngines

OF_ALL_MODELS = {"requests_total", "rejected_total", "cancelled_total", "up"}
Numbers = dict[tuple[str, frozenset], float]


@pytest.fixture
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture
def client(engine: Engine) -> Iterator[httpx.Client]:
    with served(engine, replica="r1") as client:
        yield client


def read(client: httpx.Client, **headers: str) -> Numbers:
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for f in families for sample in f.samples}


def value(numbers: Numbers, name: str, **labels: str) -> float:
    model = {} if name in OF_ALL_MODELS else {"model": "tiny", "version": "3"}
    return numbers.get((f"diffusion_{name}", frozenset({**labels, **model, "replica": "r1"}.items())), 0.0)


def until(client: httpx.Client, wanted: int, name: str, **labels: str) -> Numbers:
    """The numbers, once this one is as wanted: a request is counted when its answer has been sent."""
    deadline = time.monotonic() + 20
    while value(numbers := read(client), name, **labels) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert value(numbers, name, **labels) == wanted
    return numbers


def test_requests_pictures_and_ticks_are_counted(client: httpx.Client) -> None:
    bodies = [
        {"label": "cat", "n": 3, "sampler": "heun", "steps": 4, "guidance": 2},
        {"label": "dog", "n": 1, "sampler": "ddim", "steps": 5, "guidance": 1},
    ]
    for body in bodies:
        assert client.post(URL, json=body).status_code == 200
    ticks = [evaluations(body["sampler"], body["steps"]) for body in bodies]
    rows = ticks[0] * 3 * 2 + ticks[1]  # a guided picture asks in two rows
    numbers = until(client, 2, "requests_total", route=URL, status="200")
    numbers = until(client, sum(ticks), "tick_rows_count")
    assert value(numbers, "tick_rows_sum") == rows
    assert value(numbers, "tick_rows_bucket", le="4.0") == ticks[1]
    assert value(numbers, "tick_seconds_count") == sum(ticks)
    assert 0 < value(numbers, "tick_seconds_sum") < 60
    assert value(numbers, "pictures_total", task="generation", key="") == 4
    assert value(numbers, "request_seconds_count", task="generation") == 2
    assert value(numbers, "wait_seconds_count") == 2
    assert [value(numbers, name) for name in ("slots", "drawing", "queue", "up")] == [LIMITS.slots, 0, 0, 1]
    assert value(numbers, "model", bundle_digest="5" * 64) == 1
    assert not [name for name, _ in numbers if name.endswith("_created")]


def test_what_is_refused_is_counted_by_why_and_tasks_apart(client, engine, monkeypatch) -> None:
    for path, fields in (
        ("edits", {"label": "cat", "steps": 2}),
        ("restorations", {"task": "colorization", "steps": 2}),
    ):
        assert client.post(f"/v1/images/{path}", files={"image": PICTURE}, data=fields).status_code == 200
    client.post(URL, json={"n": 0})
    client.get("/nowhere-at-all")
    client.get("/page/nowhere-either")
    gate, inner = threading.Event(), engine.bundle.denoiser.forward
    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patch:
        patch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: gate.wait(60) and inner(*a, **k))
        body = {"label": "cat", "n": 6, "steps": 2}
        waiting = [pool.submit(client.post, URL, json=body) for _ in range(2)]  # 4 slots and 8 places in the queue
        until(client, 8, "queue")
        until(client, 4, "drawing")
        assert client.post(URL, json=body).status_code == 503
        gate.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]
    numbers = until(client, 1, "rejected_total", reason="queue")
    assert value(numbers, "rejected_total", reason="invalid") == 3
    assert value(numbers, "requests_total", route="other", status="404") == 1
    assert value(numbers, "requests_total", route="/page/{name}", status="404") == 1
    assert value(numbers, "requests_total", route=URL, status="422") == 1
    given = {"edit": 1, "colorization": 1, "inpainting": 0, "generation": 12}
    assert {task: value(numbers, "pictures_total", task=task, key="") for task in given} == given


def test_a_client_that_leaves_is_counted_as_cancelled_and_gets_no_pictures(client: httpx.Client) -> None:
    body = {"label": "cat", "steps": 1000, "stream": True, "partial_images": 3}
    with client.stream("POST", URL, json=body) as answer:
        assert answer.status_code == 200
    numbers = until(client, 1, "cancelled_total")
    assert value(numbers, "pictures_total", task="generation", key="") == 0
    assert value(numbers, "request_seconds_count", task="generation") == 0


def test_past_the_deadline_within_a_stream_is_a_refusal(client: httpx.Client, engine: Engine, monkeypatch) -> None:
    inner = engine.bundle.denoiser.forward
    monkeypatch.setattr(engine, "timeout_s", 0.5)
    monkeypatch.setattr(engine.bundle.denoiser, "forward", lambda *a, **k: time.sleep(0.3) or inner(*a, **k))
    with client.stream("POST", URL, json={"label": "cat", "steps": 5, "stream": True}) as answer:
        assert "event: error" in list(answer.iter_lines())
    until(client, 1, "rejected_total", reason="deadline")


def test_where_there_are_keys_metrics_need_one_and_name_whose_pictures_they_were(
    one_thread: None, tmp_path: Path
) -> None:
    secret = add(tmp_path / "keys.json", "web", rate=1)
    key = {"Authorization": f"Bearer {secret}"}
    with served(Engine(random_bundle(), slots=2), access=Access(keys=tmp_path / "keys.json"), replica="r1") as client:
        assert client.get("/metrics").status_code == 401
        statuses = [client.post(URL, json={"label": "cat", "steps": 2, "n": 2}, headers=key).status_code for _ in "12"]
        read(client, **key)  # as often as one likes
        numbers = read(client, **key)
    assert statuses == [200, 429]
    assert value(numbers, "pictures_total", task="generation", key="web") == 2
    assert [value(numbers, "rejected_total", reason=reason) for reason in ("key", "rate", "concurrency")] == [1, 1, 0]
    assert value(numbers, "requests_total", route="/metrics", status="401") == 1
    assert not any(secret in str(name) for name in numbers)


def test_of_a_version_that_is_gone_for_long_nothing_is_told(one_thread: None, monkeypatch) -> None:
    versions = [MODEL, MODEL.model_copy(update={"version": "4", "digest": "6" * 64})]
    shelf = Shelf(OfEngines({model.version: Engine(random_bundle(), slots=2) for model in versions}))
    told = metrics.Metrics(shelf)
    try:
        for model in versions:
            shelf.change(Lineup(models=(model,)))
            told.ticked(model, 2, 0.1)
        assert all(f'tick_rows_count{{model="tiny",version="{version}"' in told.text().decode() for version in "34")
        monkeypatch.setattr(metrics, "_GONE_S", 0.0)
        time.sleep(0.01)  # of the clock
        left = told.text().decode()
        assert ('version="3"' in left, 'version="4"' in left) == (False, True)
    finally:
        shelf.close()
