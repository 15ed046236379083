"""`diffusion schedule` with a real Prefect server: it fires, does nothing where nothing changed, and survives what it meets.

One story, since each part of it takes a run: a run is cancelled in its training; everything is killed under the next one,
and the next start tells Prefect that it died; one goes on from there and finishes; one has nothing to do.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.processes import command_of, kill
from tests.program import Place, read_until, running

STAGES = ("shard", "train", "evaluate", "register")
CRON = "* * * * * */20"  # every twenty seconds; those that come due under another are cancelled


@dataclass(frozen=True)
class Notified(Place):
    """A place whose people hear of runs: a line for each message."""

    @property
    def heard(self) -> Path:
        return self.root / "heard"

    def environment(self) -> dict[str, str]:
        script = self.root / "notify.py"
        script.write_text(f"import sys; open({str(self.heard)!r}, 'a').write(sys.stdin.read() + chr(10))")
        return super().environment() | {"DIFFUSION_NOTIFY": f"{sys.executable} {script}"}


@pytest.fixture
def place(short_tmp: Path) -> Notified:
    root = short_tmp / "sch"
    root.mkdir()
    return Notified(root)


def until(find: Callable[[], object], timeout_s: float = 240) -> object:
    end = time.monotonic() + timeout_s
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.3)
    return found


class Prefect:
    """Its API, as its page asks it."""

    def __init__(self, process: subprocess.Popen) -> None:
        said = read_until(process, "Press Ctrl-C to stop")
        page = next(line.split()[1] for line in said.splitlines() if line.strip().startswith("Prefect "))
        assert "text/html" in httpx.get(page, follow_redirects=True).headers["content-type"]
        self.url = f"{page}/api"

    def ask(self, path: str, **body: object) -> list[dict] | dict:
        answer = httpx.post(f"{self.url}{path}", json=body, timeout=30)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def deployment(self) -> dict:
        (found,) = self.ask("/deployments/filter")
        return found

    def run(self, id: str) -> dict:
        return httpx.get(f"{self.url}/flow_runs/{id}", timeout=30).json()

    def tasks(self, id: str) -> list[dict]:
        return self.ask("/task_runs/filter", flow_runs={"id": {"any_": [id]}})

    def begun(self, known: list[str]) -> str:
        """The id of a run that is not among those, as soon as one has begun."""

        def find() -> list[str]:
            began = {"type": {"any_": ["RUNNING", "COMPLETED", "FAILED", "CRASHED"]}}
            runs = self.ask("/flow_runs/filter", flow_runs={"state": began})
            return [run["id"] for run in runs if run["id"] not in known]

        new, *_ = until(find)
        known.append(new)
        return new

    def ended(self, id: str) -> dict:
        return until(lambda: (run := self.run(id))["state_type"] not in ("PENDING", "RUNNING", "CANCELLING") and run)

    def in_training(self, id: str) -> None:
        def trains() -> bool:
            return any(task["name"].startswith("train") and task["state_type"] == "RUNNING" for task in self.tasks(id))

        until(lambda: trains() or self.run(id)["state_type"] in ("FAILED", "CRASHED", "COMPLETED"))
        assert trains(), self.run(id)["state"]


def of_ray(place: Place) -> dict[int, str]:
    """Processes of a Ray of this home."""
    lines = {int(folder.name): command_of(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    return {pid: line for pid, line in lines.items() if f"{place.home}/ray/r/" in line}


def test_a_schedule_over_its_life(place: Notified, emoji_folder: Path):
    def schedule(*more: str) -> AbstractContextManager[subprocess.Popen]:
        pictures = ("--preset", "smoke", "--source", str(emoji_folder), "--warm")
        return running(place, "schedule", "--cron", CRON, *pictures, *more)

    known: list[str] = []
    with schedule("--now") as process:
        prefect = Prefect(process)
        assert prefect.deployment()["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
        first = prefect.begun(known)
        prefect.in_training(first)
        its_ray = until(lambda: of_ray(place))
        prefect.ask(f"/flow_runs/{first}/set_state", state={"type": "CANCELLING"})
        until(lambda: prefect.run(first)["state_type"] == "CANCELLED")
        until(lambda: not its_ray.items() & of_ray(place).items())  # the next run has one of its own

        second = prefect.begun(known)
        assert prefect.run(second)["auto_scheduled"]
        until(lambda: prefect.tasks(second))
        process.kill()
        kill(*place.processes())
        process.wait()
    assert place.wait_for_end() == []

    with schedule() as process:
        prefect = Prefect(process)
        died = prefect.ended(second)
        assert died["state_type"] == "CRASHED"
        assert "ended without a word" in died["state"]["message"]
        until(lambda: {task["state_type"] for task in prefect.tasks(second)} <= {"COMPLETED", "CRASHED"})

        third = prefect.begun(known)  # its place is free
        assert prefect.ended(third)["state_type"] == "COMPLETED", prefect.run(third)["state"]
        fourth = prefect.begun(known)
        done = prefect.ended(fourth)
        assert done["state_type"] == "COMPLETED", done["state"]
        own = {"id": {"any_": [fourth]}}
        (page,) = prefect.ask("/artifacts/filter", flow_runs=own, artifacts={"key": {"any_": ["line"]}})
        assert "there was nothing to do" in page["data"]
        assert [line.split()[1] for line in page["data"].splitlines() if " the same " in line] == list(STAGES)
        assert "data:image/jpeg;base64," in page["data"]

        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=200)[0]
        assert process.returncode == 0, rest
    assert place.wait_for_end() == []
    told = [json.loads(line)["event"] for line in place.heard.read_text().splitlines()]
    assert (set(told), told.count("promoted")) == ({"failed", "promoted"}, 1)
