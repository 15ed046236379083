"""Finished work is not done twice, nor by two at a time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRELUDE = """
import sys, time
from pathlib import Path
from diffusion.presets import PRESETS
from diffusion.store.refs import DatasetRef
from diffusion.store.works import work_key
from flows.site import Site
from flows.stage import once

home = Path(sys.argv[1])
site = Site(home=home)
key = work_key("shard", PRESETS["smoke"]().shard, ("a source",))
ref = DatasetRef(uri=str(home / "made"), digest="0" * 64, resolution=32, classes=("a",), images=1, holdout=0, rejected=0)

def make():
    with open(home / "calls", "a") as calls:
        calls.write("made\\n")
    while (home / "hold").exists():
        time.sleep(0.05)
    (home / "made").mkdir(exist_ok=True)
    (home / "made" / "manifest.json").write_text("{}")
    return ref
"""
ONCE = PRELUDE + 'done = once("shard", key, DatasetRef, site, make)\nassert done.ref == ref\nprint(done.reused)\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    return tmp_path / "d"


def start(home: Path, program: str) -> subprocess.Popen[str]:
    """In a process of its own: Prefect's folder is chosen when it is imported."""
    environment = os.environ | {"PREFECT_HOME": str(home / "prefect"), "HOME": str(home)}
    command = [sys.executable, "-c", program, str(home)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out


def test_finished_work_is_recalled_and_lost_work_done_again(home: Path) -> None:
    program = ONCE + (
        'again = once("shard", key, DatasetRef, site, make)\nprint(again.reused)\n'
        '(home / "made" / "manifest.json").unlink()\n'
        'print(once("shard", key, DatasetRef, site, make).reused)\n'
        'print(once("shard", key, DatasetRef, site, make, now=lambda ref: None).reused)\n'
    )
    out = said(start(home, program))
    assert [line for line in out.splitlines() if line in ("True", "False")] == ["False", "True", "False", "False"]
    assert out.count("done before, not done again") == 1
    assert (home / "calls").read_text().count("made") == 3


def test_of_two_processes_one_works_and_one_waits(home: Path) -> None:
    (home / "hold").touch()
    first = start(home, ONCE)
    end = time.monotonic() + 60
    while not (home / "calls").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    second = start(home, ONCE)
    waits = second.stdout.readline()
    assert f"shard     process {first.pid} on " in waits
    (home / "hold").unlink()
    assert said(first).splitlines()[-1] == "False"
    out = said(second)
    assert "shard     done before, not done again: the same inputs, the same recipe" in out
    assert out.splitlines()[-1] == "True"
    assert (home / "calls").read_text().count("made") == 1


def test_work_that_fails_is_not_remembered(home: Path) -> None:
    program = PRELUDE + (
        "def fail():\n    raise ValueError('no')\n"
        'try:\n    once("shard", key, DatasetRef, site, fail)\nexcept ValueError:\n    pass\n'
        'print(once("shard", key, DatasetRef, site, make).reused)\n'
    )
    assert said(start(home, program)).splitlines()[-1] == "False"


def test_what_was_made_is_made_once_however_often_telling_of_it_fails(home: Path) -> None:
    program = PRELUDE + (
        "tries = []\n"
        "def tell(ref):\n    tries.append(ref)\n    if len(tries) < 3:\n        raise ConnectionError('away')\n"
        "for _ in range(2):\n"
        '    try:\n        once("shard", key, DatasetRef, site, make, tell=tell)\n'
        "    except ConnectionError:\n        pass\n"
        'print([once("shard", key, DatasetRef, site, make, tell=tell).reused for _ in range(2)], len(tries))\n'
        "print(tries == [ref] * 3)\n"
        '(home / "made" / "manifest.json").unlink()\n'
        'print(once("shard", key, DatasetRef, site, make, tell=tell).reused)\n'
    )
    lines = said(start(home, program)).splitlines()
    assert [line for line in lines if "shard" not in line] == ["[False, True] 3", "True", "False"]
    assert (home / "calls").read_text().count("made") == 2  # the second time because it was deleted


def test_prefect_takes_an_endpoint_apart(tmp_path: Path) -> None:
    """As it does with what a stage returns; a field that hides a dictionary's method would end it there."""
    program = """
from prefect.utilities.collections import visit_collection
from diffusion.serving.lineup import Lineup
from diffusion.store.refs import ModelRef
from flows.endpoint import Endpoint
model = ModelRef(uri="m", digest="5" * 64, name="m", version="1", aliases=(), run_digest="1", dataset_digest="2")
offered = {"lineup": Lineup(models=(model,)), "digests": (model.digest,)}
seen = []
visit_collection(Endpoint(url="http://x", model=model, guarded=True, **offered), visit_fn=seen.append, max_depth=1)
assert model in seen
"""
    environment = os.environ | {"PREFECT_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=100)


def test_work_of_a_killed_process_is_taken_over_at_once(home: Path) -> None:
    (home / "hold").touch()
    first = start(home, ONCE)
    end = time.monotonic() + 60
    while not (home / "calls").exists():
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    first.kill()
    (home / "hold").unlink()
    first.communicate()
    (_,) = (home / "store" / "leases").iterdir()
    assert said(start(home, ONCE)).splitlines()[-1] == "False"
    assert list((home / "store" / "leases").iterdir()) == []
    assert (home / "calls").read_text().count("made") == 2
