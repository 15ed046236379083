"""What infra/kubernetes/sampler.yaml has Ray serve, on a real Ray that is started and asked as by KubeRay."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from diffusion.adapters.mlflow_registry import register
from diffusion.adapters.ray_cluster import ray_environment
from diffusion.adapters.ray_serve import APP
from diffusion.serving.keys import FILE, add
from diffusion.serving.request import GenerateRequest
from diffusion.store.refs import ModelRef
from tests.leaks import PLANTED, leaks
from tests.mlflow_server import answers
from tests.ports import free_port
from tests.processes import descendants, kill
from tests.program import ROOT
from tests.registered_run import FIRST, endpoint_png, evaluated, sampling

SAMPLER = ROOT / "infra" / "kubernetes" / "sampler.yaml"
TOKEN = "t" * 48
HEADERS = {"x-ray-authorization": f"Bearer {TOKEN}"}  # the operator's
BODY = {"label": "flags", "seed": 7}


@pytest.fixture(scope="module")
def second(tracking, run, home, champion, tiny_recipe) -> ModelRef:
    evaluation = evaluated(home / "store", run, sampling(4), 11.0)
    verdict = FIRST.model_copy(update={"against": "1"})
    return register(tracking, evaluation, verdict, "smoke", tiny_recipe.evaluate)


@pytest.fixture(scope="module")
def key(home: Path) -> str:
    return add(home / FILE, "web")


@pytest.fixture(scope="module")
def cluster(home: Path, short_tmp: Path) -> Iterator[str]:
    """A head by itself, whose dashboard this is: with a token, and the site in its environment."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    ports |= {"ray-client-server-port": free_port(), "dashboard-agent-grpc-port": free_port()}
    ours = ("DIFFUSION_", "PREFECT_", "MLFLOW_", "RAY_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= ray_environment(home / "ray") | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment.pop("RAY_AUTH_TOKEN_PATH")
    environment = PLANTED | environment
    environment |= {"DIFFUSION_HOME": str(home), "DIFFUSION_HOST": "0.0.0.0", "DIFFUSION_GPU": "false"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = [f"--{name}={port}" for name, port in ports.items()]
    program = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4"]
    log = short_tmp / "head.log"
    with (
        open(log, "wb") as written,
        subprocess.Popen(
            [*program, *options, f"--temp-dir={short_tmp / 'h'}"],
            cwd=home,
            env=environment,
            stdout=written,
            stderr=written,
            start_new_session=True,
        ) as head,
    ):
        try:
            url = f"http://127.0.0.1:{ports['dashboard-port']}"
            deadline = time.monotonic() + 120
            while not answers(f"{url}/api/gcs_healthz"):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
            yield url
        finally:
            started = descendants(head.pid)
            head.terminate()
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                head.kill()
            kill(*started)


def config(port: int, **args: str) -> dict:
    """The manifest's own, at another port, of another model."""
    manifest = yaml.safe_load(SAMPLER.read_text())
    found = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    found["http_options"]["port"] = port
    found["applications"][0]["args"] = args
    return found


def put(cluster: str, wanted: dict) -> None:
    answer = httpx.put(f"{cluster}/api/serve/applications/", json=wanted, headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text


def settled(cluster: str) -> tuple[str, str]:
    """(status, message) of the application, once it is neither deploying nor to come."""
    deadline = time.monotonic() + 200
    while True:
        answer = httpx.get(f"{cluster}/api/serve/applications/", headers=HEADERS, timeout=60).json()
        found = answer["applications"].get(APP, {"status": "NOT_STARTED", "message": ""})
        if found["status"] not in ("NOT_STARTED", "DEPLOYING"):
            return found["status"], found["message"]
        assert time.monotonic() < deadline, found
        time.sleep(0.3)


def test_a_cluster_serves_by_its_configuration_and_changes_the_model_under_load(
    cluster, champion, second, key, home, short_tmp
) -> None:
    assert httpx.get(f"{cluster}/api/serve/applications/").status_code == 401
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def ask() -> dict:
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/images/generations", json=BODY, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]

    put(cluster, config(port, name="smoke", which="1"))
    assert settled(cluster) == ("RUNNING", "")
    assert base64.b64decode(ask()["b64_json"]) == endpoint_png(champion, GenerateRequest(**BODY))
    assert httpx.post(f"{url}/v1/images/generations", json=BODY).status_code == 401

    stop, given = threading.Event(), []

    def busy() -> None:
        while not stop.is_set():
            given.append(ask()["receipt"]["version"])

    asking = threading.Thread(target=busy)
    asking.start()
    try:
        put(cluster, config(port, name="smoke", which="2"))
        deadline = time.monotonic() + 120
        while "2" not in given[-1:]:
            assert asking.is_alive()
            assert time.monotonic() < deadline, settled(cluster)
            time.sleep(0.2)
    finally:
        stop.set()
        asking.join()
    assert given == sorted(given)
    assert settled(cluster) == ("RUNNING", "")

    put(cluster, config(port, name="smoke", which="9"))
    status, message = settled(cluster)
    assert status == "DEPLOY_FAILED"
    assert "no alias or version '9'" in message
    assert ask()["receipt"]["version"] == "2"
    with httpx.Client() as client:
        assert json.loads(client.get(f"{url}/healthz").text)["bundle_digest"] == second.digest
    secrets = PLANTED | {"RAY_AUTH_TOKEN": TOKEN, "key": key}
    assert leaks(secrets, [home, short_tmp]) == [], "among them Ray's logs of the head, its replicas and the dashboard"
    assert list(short_tmp.rglob("raylet*"))
