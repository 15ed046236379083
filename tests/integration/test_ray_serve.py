"""The endpoint on a real Ray Serve: deployed, changed under load, refused, killed."""

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from diffusion.adapters.ray_serve import DeployFailed, deploy, deployed, undeploy
from diffusion.lineage.replay import redraw
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add, remove
from diffusion.serving.lineup import Canary
from diffusion.serving.receipt import opened, read_receipt, stamp
from diffusion.store.bundle import load_bundle
from diffusion.store.refs import ModelRef
from tests.chromium import chromium
from tests.chromium import opened as on_page
from tests.on_page import draw, more
from tests.ports import free_port
from tests.processes import kill, ours
from tests.random_bundle import published_model

LIMITS = ServeRecipe(slots=4, queue=32, max_n=6, max_steps=1000, timeout_s=900, max_wait_s=900)  # on a busy machine
BODY = {"label": "cat", "seed": 1, "n": 2, "steps": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[ModelRef]:
    store = tmp_path_factory.mktemp("store")
    return [published_model(store, seed=i, version=str(i + 1)) for i in range(2)]


@pytest.fixture(scope="module")
def access(tmp_path_factory) -> Access:
    """A file of keys, which is not there yet: until one is made nobody needs one."""
    return Access(keys=tmp_path_factory.mktemp("home") / "keys.json")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("logs") / "requests.jsonl"


@pytest.fixture(scope="module")
def port(ray_local) -> Iterator[int]:
    yield free_port()
    undeploy()


@pytest.fixture
def url(port, models, access, log) -> str:
    """Version 1, deployed; at once where it is already."""
    return deploy(models[0], LIMITS, port=port, cpus=0.5, access=access, log=log)


def ask(url: str, *, timeout_s: float = 120, **body) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={**BODY, **body}, timeout=timeout_s)


def replicas() -> list[int]:
    """Process ids of our replicas."""
    return ours("ServeReplica:diffusion:images")


def test_the_page_draws_over_serve_and_stops(url):
    with chromium() as browser, on_page(browser, url) as page:
        page.locator("#n").fill("2")
        found = [read_receipt(data) for data in draw(page)]
        assert [(receipt.version, receipt.label, receipt.image) for receipt in found] == [
            ("1", "cat", 0),
            ("1", "cat", 1),
        ]
        more(page, steps=1000)
        page.locator("#n").fill("6")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#tiles img").first).to_be_visible()  # a preview came while the rest is drawn
        page.locator("#stop").click()
        expect(page.locator("#go")).to_be_enabled()
    deadline = time.monotonic() + 30
    while (load := httpx.get(f"{url}/healthz").json())["drawing"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (load["drawing"], load["waiting"]) == (0, 0)


def test_pictures_over_serve_are_the_models(url, models):
    answer = ask(url)
    assert answer.status_code == 200
    for i, item in enumerate(answer.json()["data"]):
        receipt = read_receipt(base64.b64decode(item["b64_json"]))
        assert (receipt.bundle_digest, receipt.version, receipt.image) == (models[0].digest, "1", i)
    alone = [ask(url, n=1, seed=seed).json()["data"] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: ask(url, n=1, seed=seed).json()["data"], range(4))) == alone


def test_pictures_made_under_load_are_drawn_again_to_the_same_bytes(url, models):
    """tests/benchmarks/bench_replay.py does this with more of them, of a trained model."""
    samplers = [{"sampler": name, "label": label} for name in ("heun", "ddpm", "unipc") for label in ("dog", None)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda body: ask(url, **body, seed=7).json()["data"], samplers))
    pngs = [base64.b64decode(item["b64_json"]) for answer in answers for item in answer]
    assert len(pngs) == 12
    engine = Engine(load_bundle(models[0].uri), slots=2)
    for png in pngs:
        found = opened(png)
        assert stamp(redraw(found.receipt, engine), found.receipt) == png


def test_errors_come_through_serve_unchanged(url):
    answer = ask(url, label="cats")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "label")
    health = httpx.get(f"{url}/healthz", timeout=30)
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert health.headers["x-content-type-options"] == "nosniff"


def test_headers_do_not_steer_serve_nor_fail_it(url):
    hurried = httpx.post(
        f"{url}/v1/images/generations", json=BODY, headers={"X-Request-Timeout-Seconds": "0.001"}, timeout=120
    )
    mad = [(b"X-Request-ID", b"\xff"), (b"X-Session-ID", b"\xff"), (b"Serve-Multiplexed-Model-Id", b"\xff")]
    health = httpx.get(f"{url}/healthz", headers=mad, timeout=30)
    assert (hurried.status_code, health.status_code) == (200, 200)
    assert health.headers["x-request-id"].isascii()


def test_bodies_that_do_not_come_keep_nobody_out(url):
    place = httpx.URL(url)
    begun = f"POST /v1/images/generations HTTP/1.1\r\nHost: {place.host}\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        for _ in range(300):
            connection = stack.enter_context(socket.create_connection((place.host, place.port), timeout=30))
            connection.sendall(f"{begun}Content-Length: 100\r\n\r\n{{".encode())
        assert ask(url, n=1, timeout_s=60).status_code == 200


def test_a_replica_follows_the_keys(url, access):
    secret = add(access.keys, "web")
    refused, health = ask(url), httpx.get(f"{url}/healthz", timeout=30)
    known = httpx.post(
        f"{url}/v1/images/generations", json=BODY, headers={"Authorization": f"Bearer {secret}"}, timeout=120
    )
    remove(access.keys, "web")
    assert (refused.status_code, refused.headers["www-authenticate"], health.status_code) == (401, "Bearer", 200)
    assert (known.status_code, ask(url).status_code) == (200, 200)


def test_a_request_leaves_a_line_in_the_log(url, log):
    name = "a-request-of-mine"
    answer = httpx.post(f"{url}/v1/images/generations", json=BODY, headers={"X-Request-ID": name}, timeout=120)
    assert answer.headers["x-request-id"] == name
    deadline, lines = time.monotonic() + 20, []
    while not lines and time.monotonic() < deadline:
        lines = [line for line in map(json.loads, log.read_text().splitlines()) if line["id"] == name]
        time.sleep(0.05)
    assert [(line["route"], line["status"], line["n"], line["steps"]) for line in lines] == [
        ("/v1/images/generations", 200, 2, 3)
    ]
    numbers = httpx.get(f"{url}/metrics", timeout=30).text
    assert re.search(
        r'diffusion_pictures_total{key="",model="tiny",replica="\w+",task="generation",version="1"} [1-9]', numbers
    )


def test_only_loopback_listens(url):
    port, listening = int(url.rpartition(":")[2]), "0A"
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    addresses = {row[1] for row in rows if row[3] == listening and int(row[1].rpartition(":")[2], 16) == port}
    assert addresses == {f"0100007F:{port:04X}"}


def test_a_client_that_leaves_frees_its_slots_through_serve(url):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/images/generations", json={**BODY, "n": 6, "steps": 1000}, timeout=httpx.Timeout(30, read=2)
        )
    deadline = time.monotonic() + 60
    while (state := httpx.get(f"{url}/healthz", timeout=30).json())["drawing"] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (state["drawing"], state["waiting"]) == (0, 0)


def test_deploying_the_same_again_changes_nothing(url, models, port, access, log):
    before = replicas()
    assert len(before) == 1
    assert deploy(models[0], LIMITS, port=port, cpus=0.5, access=access, log=log) == url
    assert replicas() == before


def test_a_killed_replica_comes_back_with_the_same_pictures(url):
    before = ask(url).json()["data"]
    (replica,) = replicas()
    assert kill(replica)
    deadline = time.monotonic() + 240  # seconds on a quiet machine
    answer = None
    while time.monotonic() < deadline and (answer is None or answer.status_code != 200):
        try:
            answer = ask(url, timeout_s=30)  # what was in flight may never be answered
        except httpx.HTTPError:
            time.sleep(0.5)
    assert answer.status_code == 200
    assert answer.json()["data"] == before
    assert replica not in replicas()


def test_a_damaged_version_is_refused_and_the_old_one_goes_on(url, models, port, tmp_path, access, log):
    damaged = published_model(tmp_path, seed=7, version="9")
    weights = Path(damaged.uri) / "weights.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DeployFailed, match=r"version 9 does not serve: .*sha256.* Version 1 goes on"):
        deploy(damaged, LIMITS, port=port, cpus=0.5, access=access, log=log)
    assert ask(url).json()["version"] == "1"
    assert deployed().model == models[0]


def test_another_port_is_refused_while_serve_listens_elsewhere(url, models, access, log):
    with pytest.raises(DeployFailed, match="undeploy"):
        deploy(models[0], LIMITS, port=free_port(), cpus=0.5, access=access, log=log)
    assert ask(url).status_code == 200


def test_a_new_version_takes_over_in_the_same_replica_without_a_lost_request(url, models, port, access, log):
    before = replicas()
    statuses, versions, stop = [], [], threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answer = ask(url, n=1)
            statuses.append(answer.status_code)
            versions.append(answer.json().get("version"))

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        try:
            assert deploy(models[1], LIMITS, port=port, cpus=0.5, access=access, log=log) == url
            time.sleep(1)
        finally:
            stop.set()
        for task in asking:
            task.result()
    assert set(statuses) == {200}
    assert set(versions) == {"1", "2"}
    assert versions[-1] == "2"
    assert deployed().model == models[1]
    assert replicas() == before
    health = httpx.get(f"{url}/healthz", timeout=30).json()
    assert ([each["version"] for each in health["loaded"]], health["refused"]) == (["2"], None)


def test_a_replica_that_comes_later_offers_what_is_offered_now(models, port, access, log):
    """Also after a broken model was asked for, which Serve would give it otherwise."""
    url = deploy(models[0], LIMITS, port=port, cpus=0.5, access=access, log=log)
    nowhere = models[1].model_copy(update={"uri": "/nowhere", "version": "9"})
    also = {"beside": models[1:], "canaries": [Canary(version="2", share=0.5)]}
    with pytest.raises(DeployFailed, match=r"no bundle.* Version 1 goes on"):
        deploy(nowhere, LIMITS, port=port, cpus=0.5, access=access, log=log)
    before = replicas()
    deploy(models[0], LIMITS, port=port, cpus=0.5, access=access, log=log, **also)
    assert replicas() == before
    got = {seed: ask(url, n=1, seed=seed).json()["version"] for seed in range(8)}
    assert set(got.values()) == {"1", "2"}
    assert ask(url, n=1, model="tiny@2").json()["version"] == "2"
    assert kill(before[0])
    deadline, again = time.monotonic() + 240, {}
    while again != got and time.monotonic() < deadline:
        try:
            again = {seed: ask(url, n=1, seed=seed, timeout_s=30).json().get("version") for seed in got}
        except httpx.HTTPError:
            time.sleep(0.5)
    assert again == got
