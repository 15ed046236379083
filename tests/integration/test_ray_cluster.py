"""A Ray of our own leaves nothing running, however its processes end."""

import signal
import subprocess
import sys
import time

import pytest

from tests.processes import command_of
from tests.program import ROOT, Place

PROGRAM = """
import os, signal, sys
from pathlib import Path
from diffusion.adapters import ray_cluster
from tests.processes import command_of, descendants
from tests.program import Place

with ray_cluster.local_ray(Path(sys.argv[1]), cpus=1):
    import ray
    ray.get(ray.remote(lambda: None).remote())
    ours, found = descendants(os.getpid()), Place(Path(sys.argv[1]).parent).processes()
    missed = [command_of(pid) for pid in ours if pid not in found]
    assert not any(missed), missed
    print(*ours, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    for process in ray_cluster._started:
        process.terminate = process.kill  # what Ray does on a busy machine to those that are not gone in a second
"""


@pytest.mark.parametrize(("end", "code"), [("busy", 0), ("killed", -9)])
def test_agents_end_though_their_raylet_is_killed(place: Place, end: str, code: int) -> None:
    """By themselves they take up to a minute: they ask a GCS that is gone."""
    command = [sys.executable, "-c", PROGRAM, str(place.home), end]
    done = subprocess.run(command, cwd=ROOT, env=place.environment(), stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == code
    left = list(map(int, done.stdout.split()))
    assert len(left) > 5
    deadline = time.monotonic() + 10
    while (left := list(filter(command_of, left))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [command_of(pid) for pid in left] == []


STARTING = """
import os, signal, sys, threading, time
from pathlib import Path
from diffusion.adapters import ray_cluster
from tests.processes import descendants

def end() -> None:
    while len(ray_cluster._started) < 2:  # the raylet comes after them
        time.sleep(0.01)
    print(*descendants(os.getpid()), flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))

threading.Thread(target=end, daemon=True).start()
with ray_cluster.local_ray(Path(sys.argv[1]), cpus=1):
    print("it has started")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_of_a_ray_that_was_starting(place: Place, number: int) -> None:
    """As where a run is cancelled, or killed, just then."""
    command = [sys.executable, "-c", STARTING, str(place.home), str(int(number))]
    done = subprocess.run(command, cwd=ROOT, env=place.environment(), stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode != 0
    assert "it has started" not in done.stdout
    assert len(done.stdout.split()) >= 2
    assert place.wait_for_end(10) == []
