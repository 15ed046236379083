"""The flows against a real Prefect server, unchanged: parameters, artifacts, a deployment, a worker, a schedule.

Also a smoke test of the installed versions: with some of FastAPI and SQLAlchemy, `prefect deploy` or schedules fail.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from diffusion.presets import PRESETS
from tests.ports import free_port
from tests.program import ROOT

PREFECT = (sys.executable, "-m", "prefect")


@contextmanager
def background(arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """A program of its own session, ended by SIGTERM and, where that is not enough, with its children by SIGKILL."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], object], timeout_s: float, log: Path) -> object:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, log.read_text()[-3_000:]
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def environment(short_tmp: Path) -> Iterator[dict[str, str]]:
    """A server's, a worker's and a user's environment: everything in one folder, the server on loopback."""
    folder = short_tmp / "prefect"
    folder.mkdir()
    url = f"http://127.0.0.1:{free_port()}/api"
    ours = ("DIFFUSION_", "PREFECT_", "MLFLOW_", "RAY_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)} | {
        "HOME": str(folder),
        "PREFECT_HOME": str(folder / "server"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DIFFUSION_HOME": str(folder / "d"),
        "DIFFUSION_GPU": "false",
    }
    log = folder / "server.log"
    server = (*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", url.split(":")[2].split("/")[0], "--no-ui")

    def healthy() -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    with background(server, environment, log):
        wait_for(healthy, 120, log)
        yield environment


def ask(environment: dict[str, str], path: str, **body: object) -> list[dict]:
    answer = httpx.post(f"{environment['PREFECT_API_URL']}{path}", json=body, timeout=30)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def runs(environment: dict[str, str], **name: dict) -> list[dict]:
    return ask(environment, "/flow_runs/filter", **name)


def test_the_line_runs_on_a_server_as_without_one(environment: dict[str, str], emoji_folder: Path) -> None:
    command = ("run", "--preset", "smoke", "--source", str(emoji_folder), "--until", "register")
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = runs(environment, flows={"name": {"any_": ["pipeline"]}})
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"]["recipe"] == PRESETS["smoke"]().model_dump(mode="json")
    tasks = ask(environment, "/task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    assert {task["name"].rsplit("-", 1)[0] for task in tasks} == {"shard", "train", "evaluate", "register"}
    artifacts = {found["key"]: found for found in ask(environment, "/artifacts/filter")}
    pages = {"dataset", "plan", "training-curve", "train-progress", "evaluation", "verdict", "line"}
    assert artifacts.keys() == pages
    assert "data:image/jpeg;base64," in artifacts["evaluation"]["data"]
    assert "(grid.png)" not in artifacts["evaluation"]["data"]
    curve = json.loads(artifacts["training-curve"]["data"])
    assert curve[-1]["images_seen"] == PRESETS["smoke"]().train.images
    assert "champion" in artifacts["verdict"]["data"]
    assert artifacts["train-progress"]["data"] == 100
    assert "is the champion" in artifacts["line"]["data"]


def test_a_deployment_on_a_schedule_is_run_by_a_worker(environment: dict[str, str], emoji_folder: Path) -> None:
    def prefect(*arguments: str) -> None:
        done = subprocess.run(
            [*PREFECT, "--no-prompt", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    parameters = {
        "recipe": PRESETS["smoke"]().shard.model_dump(mode="json"),
        "source": str(emoji_folder),
    }
    prefect("work-pool", "create", "here", "--type", "process")
    prefect(
        *("deploy", "flows/shard.py:shard", "--name", "nightly", "--pool", "here", "--cron", "* * * * *"),
        *("--params", json.dumps(parameters)),
    )
    (deployment,) = ask(environment, "/deployments/filter")
    form = deployment["parameter_openapi_schema"]
    assert set(form["properties"]) == {"recipe", "source", "site", "train", "fresh"}
    assert form["definitions"]["ShardRecipe"]["properties"]["resolution"]["multipleOf"] == 8

    log = Path(environment["HOME"]) / "worker.log"
    worker = (*PREFECT, "worker", "start", "--pool", "here")

    def done_on_schedule() -> list[dict]:
        found = runs(
            environment, flows={"name": {"any_": ["shard"]}}, flow_runs={"state": {"type": {"any_": ["COMPLETED"]}}}
        )
        return [run for run in found if run["auto_scheduled"]]

    with background(worker, environment | {"PREFECT_WORKER_QUERY_SECONDS": "2"}, log):
        wait_for(done_on_schedule, 240, log)


def test_the_deployments_for_work_pools_are_taken_as_they_are(environment: dict[str, str]) -> None:
    for arguments in (
        ("work-pool", "create", "diffusion", "--type", "process"),
        ("deploy", "--all", "--prefect-file", "infra/prefect.yaml"),
    ):
        done = subprocess.run(
            [*PREFECT, "--no-prompt", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found = ask(environment, "/deployments/filter", work_pools={"name": {"any_": ["diffusion"]}})
    line = {deployment["name"]: deployment for deployment in found}
    assert line.keys() == {"nightly", "by-hand"}
    assert [schedule["schedule"]["cron"] for schedule in line["nightly"]["schedules"]] == ["0 3 * * *"]
    assert line["by-hand"]["schedules"] == []
    for deployment in found:
        assert deployment["entrypoint"] == "flows.pipeline.pipeline"
        assert deployment["global_concurrency_limit"]["limit"] == 1
        assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        assert deployment["pull_steps"] in (None, [])
        assert {"recipe", "source", "until", "warm"} <= deployment["parameter_openapi_schema"]["properties"].keys()


TRIED = """
import logging
from prefect import flow, task
from flows.retries import TASK, WAITS_S
seen = []
def make(error, times):
    seen.append(error)
    if len(seen) <= times:
        raise error
    return len(seen)
made = task(make, **(TASK | {"retry_delay_seconds": [0.01] * len(WAITS_S)}))
@flow
def passing():
    return made(ConnectionError("away"), 3)
@flow
def failing():
    return made(ValueError("wrong"), 1)
logging.disable(logging.CRITICAL)
print(passing())
seen.clear()
try:
    failing()
except ValueError:
    print(len(seen))
"""


def test_a_stage_is_tried_again_until_it_succeeds_and_a_mistake_is_not(environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", TRIED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith("!")] == ["4", "1"]


CRASHED = """
import sys
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Cancelling, Crashed, Running
from flows.told import tell_failed
nothing = flow(lambda: None, name="nothing")
with get_client(sync_client=True) as client:
    for states in ((Running(), Cancelling()), (Running(),)):
        run = client.create_flow_run(nothing)
        for state in (*states, Crashed(message="ended")):
            client.set_flow_run_state(run.id, state, force=True)
        tell_failed(nothing, run, Crashed(message=f"after {states[-1].name}"))
"""


def test_a_run_that_is_cancelled_is_not_told_as_failed(environment: dict[str, str], tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    hook = f"{sys.executable} -c \"import sys; open('{heard}', 'a').write(sys.stdin.read())\""
    command = [sys.executable, "-c", CRASHED]
    told = environment | {"DIFFUSION_NOTIFY": hook}
    done = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(heard.read_text())["text"].endswith(": after Running")
