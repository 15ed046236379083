"""A run of the line that has nothing to do: `python -m tests.benchmarks.bench_noop`.

A small line is run once.  Then, `--runs` times, the same command again, as a person types it, with a temporary Prefect
server of its own; and the same run by `diffusion schedule`, asked for through Prefect's API, from the request to the end of
the run as Prefect has it, of which the time until its process begins is told apart.  `--imports N`: the N modules on whose
own import a scheduled run's process spends most.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx

from tests.program import ROOT, Place, read_until, running

LIMIT_S = 20.0
LINE = ("--preset", "smoke")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def again(place: Place) -> tuple[float, float, str]:
    """Seconds, CPU seconds of it and of what it started, and what it said."""
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", *LINE]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [*command, "--until", "register"], cwd=ROOT, env=place.environment(), capture_output=True, text=True
    )
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    cpu = sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime"))
    return took, cpu, done.stdout


@contextmanager
def scheduled(place: Place) -> Iterator[httpx.Client]:
    """The API of a schedule that fires on the first of January."""
    with running(place, "schedule", "--cron", "0 0 1 1 *", *LINE) as process:
        said = read_until(process, "Press Ctrl-C to stop")
        page = next(line.split()[1] for line in said.splitlines() if line.strip().startswith("Prefect "))
        with httpx.Client(base_url=f"{page}/api", timeout=30) as client:
            yield client
        process.terminate()
        process.communicate(timeout=100)


def asked_for(client: httpx.Client) -> tuple[float, float]:
    """Seconds from asking for a run to its end, and until it began."""
    (deployment,) = client.post("/deployments/filter", json={}).json()
    asked = time.time()
    path = f"/deployments/{deployment['id']}/create_flow_run"
    # its database is busy, as Prefect's own client knows
    while (answer := client.post(path, json={})).status_code == 503:
        time.sleep(1)
    id = answer.raise_for_status().json()["id"]
    while (run := client.get(f"/flow_runs/{id}").raise_for_status().json())["state_type"] not in ENDED:
        time.sleep(0.1)
    assert run["state_type"] == "COMPLETED", run["state"]
    end, start = (datetime.fromisoformat(run[name]).timestamp() for name in ("end_time", "start_time"))
    return end - asked, start - asked


def imports(most: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import flows.pipeline"], cwd=ROOT, capture_output=True, text=True
    )
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line][1:]
    by_root: dict[str, int] = {}
    for own, _, name in rows:
        root = name.strip().partition(".")[0]
        by_root[root] = by_root.get(root, 0) + int(own)
    ordered = sorted(by_root.items(), key=lambda item: -item[1])
    return [f"{root} {us / 1e6:.2f} s" for root, us in ordered[:most]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--imports", type=int, default=0)
    given = parser.parse_args()
    if given.imports:
        print("import flows.pipeline:", ", ".join(imports(given.imports)))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="noop-", dir="/tmp") as folder:
        place = Place(Path(folder))
        again(place)
        typed = [again(place) for _ in range(given.runs)]
        print(typed[-1][2])
        seconds, cpu = ([each[i] for each in typed] for i in (0, 1))
        shown = f"{statistics.median(seconds):.1f} s, {statistics.median(cpu):.1f} s of CPU"
        print(f"typed: {shown} ({', '.join(f'{each:.1f}' for each in seconds)})")
        with scheduled(place) as client:
            fired = [asked_for(client) for _ in range(given.runs)]
    whole, waits = ([each[i] for each in fired] for i in (0, 1))
    print(
        f"scheduled: {statistics.median(whole):.1f} s, {statistics.median(waits):.1f} s until it begins"
        f" ({', '.join(f'{each:.1f}' for each in whole)})"
    )
    worst = max(*seconds, *whole)
    print(json.dumps({"typed_s": seconds, "typed_cpu_s": cpu, "scheduled_s": whole, "limit_s": LIMIT_S}))
    print(f"{'within' if worst < LIMIT_S else 'BEYOND'} the limit of {LIMIT_S:g} s: the longest {worst:.1f} s")


if __name__ == "__main__":
    main()
