"""Replicas of the endpoint come and go on a real Ray Serve while it is asked."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file

from diffusion.adapters.ray_serve import deploy, drain, undeploy
from diffusion.recipe import ServeRecipe
from diffusion.store.refs import ModelRef
from tests.memory import overwrite
from tests.ports import free_port
from tests.processes import kill, ours
from tests.random_bundle import published_model

LIMITS = ServeRecipe(slots=2, queue=64, max_steps=1000, timeout_s=900, max_wait_s=900)  # on a busy machine


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelRef:
    return published_model(tmp_path_factory.mktemp("store"), seed=0)


@pytest.fixture(scope="module")
def url(ray_local, model) -> Iterator[str]:
    try:
        yield deploy(model, LIMITS, port=free_port(), replicas=(1, 2), cpus=0.25, idle_s=2)
    finally:
        undeploy()


@pytest.fixture(scope="module")
def picture(url) -> str:
    return asked(url).json()["data"][0]["b64_json"]


def asked(url: str, steps: int = 40) -> httpx.Response:
    body = {"label": "cat", "seed": 1, "steps": steps}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)


def replicas() -> list[int]:
    """Process ids of our replicas."""
    return ours("ServeReplica:diffusion:images")


@contextmanager
def clients(url: str, number: int) -> Iterator[list[httpx.Response]]:
    """So many ask again as soon as they are answered, or a moment after it was too busy.  Yields what else they are told;
    an error of the connection is raised at the end."""
    answers, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = asked(url)
            if answer.status_code == 503 and answer.json()["error"]["type"] == "overloaded_error":
                time.sleep(0.2)
            else:
                answers.append(answer)

    with ThreadPoolExecutor(number) as pool:
        asking = [pool.submit(ask) for _ in range(number)]
        try:
            yield answers
        finally:
            stop.set()
        for one in asking:
            one.result()


def until(true: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def names(url: str) -> set[str]:
    """Those of the replicas that answer."""
    lines = [httpx.get(f"{url}/metrics", timeout=60).text for _ in range(6)]
    return {
        line.partition('replica="')[2].partition('"')[0]
        for text in lines
        for line in text.splitlines()
        if "replica=" in line
    }


def test_replicas_come_with_the_queue_and_go_with_it_and_no_request_is_lost(url, picture):
    assert len(replicas()) == 1
    with clients(url, 8) as answers:
        until(lambda: len(names(url)) == 2)
    with clients(url, 1) as later:
        until(lambda: len(replicas()) == 1)
        seen = len(later)
        until(lambda: len(later) > seen + 2)
    assert Counter(answer.status_code for answer in answers + later).keys() == {200}
    assert {answer.json()["data"][0]["b64_json"] for answer in answers + later} == {picture}


def test_a_replica_whose_weights_were_hit_in_memory_is_replaced(url, picture, model):
    before = replicas()
    weight = load_file(Path(model.uri, "weights.safetensors"))["net.down.0.blocks.0.conv2.bias"]
    assert sum(overwrite(pid, weight.numpy().tobytes(), (-weight).numpy().tobytes()) for pid in before) > 0
    answer = asked(url)  # which the next proof may come before
    assert answer.status_code == 503 or answer.json()["data"][0]["b64_json"] != picture, "nothing else shows it"
    until(lambda: replicas() and not set(replicas()) & set(before))
    until(lambda: (answer := asked(url)).status_code == 200 and answer.json()["data"][0]["b64_json"] == picture)
    assert httpx.get(f"{url}/healthz", timeout=60).json()["proved_s_ago"] < 60


def test_what_a_killed_replica_drew_is_drawn_by_another(url, picture):
    with clients(url, 6) as answers:
        until(lambda: len(names(url)) == 2)
        victim = replicas()[0]
        seen = len(answers)
        assert kill(victim)
        until(lambda: len(answers) > seen + 12)
    assert victim not in replicas()
    assert Counter(answer.text for answer in answers if answer.status_code != 200) == {}
    assert {answer.json()["data"][0]["b64_json"] for answer in answers} == {picture}


def test_drained_it_answers_what_it_was_asked_and_nothing_more(url, picture):
    until(lambda: len(replicas()) == 1)  # which then draws both
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(asked, url, 400) for _ in range(2)]
        until(lambda: httpx.get(f"{url}/healthz", timeout=60).json()["drawing"] == 2)
        assert drain(100)
        assert [one.result().status_code for one in asking] == [200, 200]
    after = asked(url)
    assert (after.status_code, after.headers["retry-after"]) == (503, "2")
    assert "nothing is served" in after.json()["error"]["message"]
    assert replicas() == []
    assert drain(0), "it is over"
