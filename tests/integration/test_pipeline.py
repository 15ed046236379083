"""The whole line through every real part, as a person runs it: a folder of pictures in, a picture out of the endpoint."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from diffusion.data.images import encode_png
from diffusion.serving.receipt import read_receipt

ROOT = Path(__file__).parents[2]
STAGES = ("shard", "train", "evaluate", "register")


@dataclass(frozen=True)
class Place:
    """A user's machine: their own HOME and TMPDIR, which stay empty, and the folder they gave to the program."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "d"

    def environment(self) -> dict[str, str]:
        ours = ("DIFFUSION_", "PREFECT_", "MLFLOW_", "RAY_", "TMPDIR", "MPLCONFIGDIR", "XDG_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        user, tmp = self.root / "user", self.root / "tmp"
        user.mkdir(exist_ok=True)
        tmp.mkdir(exist_ok=True)
        return kept | {
            "HOME": str(user),
            "TMPDIR": str(tmp),
            "DIFFUSION_HOME": str(self.home),
            "DIFFUSION_GPU": "false",
        }

    def strays(self) -> list[Path]:
        """Files outside the home."""
        return [path for folder in ("user", "tmp") for path in (self.root / folder).rglob("*")]

    def processes(self) -> list[str]:
        """Command lines of living processes that were started from here."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"DIFFUSION_HOME={self.home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # ended meanwhile
                continue
        return [line for line in found if line]

    def wait_for_end(self, timeout_s: float = 30) -> list[str]:
        """What is left of the processes after a while."""
        end = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def published(self) -> dict[str, int]:
        """Every file of the store with the time of its last change; not the locks."""
        files = (path for path in (self.home / "store").rglob("*") if path.is_file() and path.suffix != ".lock")
        return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.fixture
def place(short_tmp: Path, request: pytest.FixtureRequest) -> Place:
    root = short_tmp / request.node.name[-8:]
    root.mkdir()
    return Place(root)


@contextmanager
def running(place: Place, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=place.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell starts what runs in its background deaf to Ctrl-C, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the program says up to the line with `text`."""
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"{text!r} was never said:\n{said}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port if not 8000 <= port < 9000 else free_port()


def test_from_a_folder_to_a_picture_over_http(place: Place, emoji_folder: Path) -> None:
    port = free_port()
    line = ("run", "--preset", "smoke", "--source", str(emoji_folder), "--port", str(port))
    with running(place, *line) as process:
        said = read_until(process, "Ctrl-C")
        assert "Traceback" not in said
        assert "not done again" not in said
        grid = Path(re.search(r"samples +(\S+)", said)[1])
        assert grid.read_bytes().startswith(b"\x89PNG")
        assert re.search(r"Frechet +[\d.e+]+ ± ", said)
        assert re.search(r"smoke version 1 \(.*champion", said)
        curl = re.search(r"try +(curl .*)", said)[1]

        body = {"label": "flags", "seed": 7, "steps": 3}
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        first = httpx.post(url, json=body, headers={"Accept": "image/png"}, timeout=60)
        assert first.status_code == 200
        receipt = read_receipt(first.content)
        assert (receipt.model, receipt.version, receipt.label, receipt.seed) == ("smoke", "1", "flags", 7)
        several = httpx.post(url, json=body | {"n": 3}, timeout=60).json()["data"]
        assert len(several) == 3
        assert httpx.post(url, json=body | {"label": "dogs"}, timeout=60).status_code == 422

        subprocess.run(curl, shell=True, cwd=place.root, check=True, timeout=60)  # as a person would paste it
        assert read_receipt((place.root / "picture.png").read_bytes()).bundle_digest == receipt.bundle_digest

        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        assert process.wait(timeout=60) == 0
    assert place.wait_for_end() == []
    assert place.strays() == []
    assert list((place.home / "ray" / "r").glob("session_2*")) == [], "Ray's files are deleted when all went well"
    assert (place.home / "ray").stat().st_mode & 0o077 == 0

    before = place.published()
    with running(place, *line, "--no-wait") as process:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    assert "ends with this command" in said, "an endpoint that is gone is not advertised"
    assert "curl" not in said
    for stage in STAGES:
        assert re.search(rf"{stage} +done before, not done again", said), said
    assert place.published() == before
    assert place.wait_for_end() == []
    assert place.strays() == []

    drawn = place.root / "drawn"
    with running(
        place,
        "sample",
        "--name",
        "smoke",
        "--label",
        "flags",
        "--n",
        "2",
        "--seed",
        "7",
        "--steps",
        "3",
        "--out",
        str(drawn),
    ) as process:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    alone = read_receipt((drawn / "flags-7-000.png").read_bytes())
    assert alone.pixels_sha256 == receipt.pixels_sha256, "the endpoint and the command draw the same picture"
    assert json.loads((place.home / "store" / "bundles" / alone.bundle_digest[:16] / "bundle.json").read_text())


def test_an_interrupted_training_goes_on_where_it_was_and_a_student_learns_from_it(
    place: Place, emoji_folder: Path
) -> None:
    place = Place(place.root / "Käthe's [1]")  # Ray takes no such path
    place.root.mkdir()
    long = ("--set", "train.images=4096", "--set", "train.checkpoint_images=256")
    student = ("--set", "distill.steps=2", "--set", "distill.images=32", "--set", "gate.max_student_excess=10")
    line = ("run", "--preset", "smoke", "--source", str(emoji_folder), "--until", "register", *long, *student)
    with running(place, *line) as process:
        end = time.monotonic() + 240
        while not list(place.home.glob("store/runs/*/checkpoints/*/manifest.json")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        process.terminate()  # it alone: its children are for it to end
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130, said
        assert "interrupted" in said
        assert "Traceback" not in said
    assert place.wait_for_end() == []
    with running(place, *line) as process:
        said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said
    assert re.search(r"shard +done before", said)
    assert re.search(r"goes on from its checkpoint at [1-9]", said)
    assert re.search(r"model +smoke version 2 \(challenger, champion\)", said)
    assert re.search(r"gate +Frechet distance \S+ in 2 steps against \S+ of the champion, its teacher, in 3", said)
    assert place.wait_for_end() == []
    assert place.strays() == []


def test_a_signal_to_all_processes_ends_sharding_soon_and_it_goes_on(place: Place, tmp_path: Path) -> None:
    """Prefect's temporary server is taken away as well, for which its client would wait for minutes."""
    for i in range(3_000):
        path = tmp_path / f"{i % 3}" / f"{i:04d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)))
    line = ("shard", "--preset", "smoke", "--source", str(tmp_path))
    with running(place, *line) as process:
        while not list(place.home.glob("work/*/blobs/*")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130, said
        assert said.count("interrupted. ") == 1
        assert "Traceback" not in said
    assert place.wait_for_end() == []
    with running(place, *line) as process:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    assert "of 3,000 files" in said
    assert list(place.home.glob("work/*")) == []
    assert place.wait_for_end() == []
    assert place.strays() == []
