"""A Ray cluster of others, as `ray start` makes one: with a token, and with nodes that do not have this program."""

import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.doctor import cluster as doctor
from flows.doctor.finding import Asked, Finding
from flows.doctor.versions import LOCK
from flows.site import Site, ray_running
from tests.ports import free_port
from tests.program import ROOT


@dataclass(frozen=True)
class Cluster:
    address: str
    jobs: str
    token: Path


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A head with four CPUs, whose Python has our libraries, and of our program nothing."""
    folder.mkdir()
    python = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (found,) = (folder / "venv").glob("lib/python*/site-packages")
    (found / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # where no other .pth is heeded
    token, log = folder / "token", folder / "log"
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "ray-client-server-port": free_port()}
    ports |= {f"dashboard-agent-{kind}-port": free_port() for kind in ("listen", "grpc")}  # another Ray has the usual
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    probe = subprocess.run([python, "-c", "import diffusion"], cwd=folder, env=environment, capture_output=True)
    assert b"No module named 'diffusion'" in probe.stderr
    command = [python, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with open(log, "wb") as written:
        process = subprocess.Popen(
            [*command, "--num-cpus=4", "--object-store-memory=200000000", f"--temp-dir={folder / 'r'}"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Cluster(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{dashboard}", token)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def cluster(short_tmp: Path) -> Iterator[Cluster]:
    with started(short_tmp / "ray-cluster") as made:
        yield made


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hands its workers the folder that one is in: none that has the program."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(cluster.token))


def looked(site: Site) -> list[Finding]:
    return list(doctor.ray(Asked(site, LOCK)))


def test_the_doctor_says_what_nodes_lack_and_that_nothing_does_when_it_is_sent(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    site = Site(home=tmp_path / "d", gpu=False, ray=cluster.address)
    (found,) = looked(site)
    assert found.state == "wrong"
    assert "this program is not installed on" in found.what
    assert "DIFFUSION_RAY_SHIP=true" in found.mend
    (found,) = looked(site.model_copy(update={"ray_ship": True}))
    assert found.state == "ok", found
    assert "nodes 1, CPUs 4" in found.what
    assert list(site.home.iterdir()) == []


def test_a_token_that_is_not_the_clusters(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(other))
    (found,) = looked(Site(home=tmp_path / "d", ray=cluster.address))
    assert found.state == "wrong"
    assert "does not let us in" in found.what
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE" in found.mend
    (found,) = looked(Site(home=tmp_path / "d", ray=cluster.jobs))
    assert "does not let us in" in found.what


def program(folder: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DIFFUSION_", "PREFECT_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *words],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_a_job_makes_a_dataset_and_nodes_without_the_program_train_on_it(
    cluster: Cluster, tmp_path: Path, short_tmp: Path, emoji_folder: Path
) -> None:
    """The one from a machine that is no node, the other from a node.  One file says where all is."""
    home, source = short_tmp / "site", ("--preset", "smoke", "--source", str(emoji_folder))
    home.mkdir()
    (home / "site.toml").write_text(
        f'gpu = false\nray = "{cluster.address}"\nray_ship = true\n'
        f'[environment]\nRAY_AUTH_MODE = "token"\nRAY_AUTH_TOKEN_PATH = "{cluster.token}"\n'
    )
    jobs = {"DIFFUSION_HOME": str(home), "DIFFUSION_RAY": cluster.jobs}
    done = program(tmp_path, jobs, "submit", "shard", *source)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ shard" in done.stdout
    done = program(tmp_path, {}, "train", *source, "--home", str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✓ train" in done.stdout
    assert not (home / "ray").exists()  # none of our own was started


def test_a_jobs_exit_code_is_ours(cluster: Cluster, tmp_path: Path, short_tmp: Path) -> None:
    site = Site(home=tmp_path / "d", ray=cluster.jobs)
    assert [found.state for found in looked(site)] == ["ok"]
    where = {"DIFFUSION_RAY": cluster.jobs, "DIFFUSION_RAY_SHIP": "true", "DIFFUSION_HOME": str(site.home)}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.token)}
    done = program(tmp_path, where | token, "submit", "recipe", "show", "--preset", "none-such")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no preset 'none-such'" in done.stdout
    with pytest.raises(ValueError, match="write `diffusion submit` before the command"), ray_running(site):
        pass
