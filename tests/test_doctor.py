"""`diffusion doctor` finds what is planted on this machine, names it and says what to type.  Servers: tests/integration."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.serving.keys import add
from diffusion.store.publish import left_behind, staging
from flows.doctor.checks import CHECKS
from flows.doctor.examine import examine
from flows.doctor.finding import Asked, Check, Finding, ok
from flows.doctor.machine import Build, driver_version, judged
from flows.doctor.versions import LOCK, pins
from flows.site import Site
from tests.commands import command
from tests.ports import free_port
from tests.program import ROOT

PROGRAM = (sys.executable, "-c", "from flows.cli import main; main()", "doctor", "--json")
OF_THE_MACHINE = {"disk", "open files", "shared memory", "torch", "gpu", "versions"}  # of the one that runs the tests


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("DIFFUSION_", "PREFECT_API_", "RAY_AUTH_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(home=tmp_path / "d", gpu=False, port=free_port())


def looked(site: Site, lock: Path = LOCK) -> list[Finding]:
    return list(examine(Asked(site, lock)))


def only(findings: list[Finding], check: str) -> Finding:
    """The one finding; all else is well."""
    bad = [found for found in findings if found.state != "ok" and found.check not in OF_THE_MACHINE - {check}]
    assert [found.check for found in bad] == [check], bad
    return bad[0]


def by_program(environment: dict[str, str], shell: str = 'exec "$@"', **options: object) -> tuple[int, list[Finding]]:
    """As a person runs it, by a line of a shell."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DIFFUSION_", "PREFECT_", "RAY_"))}
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *PROGRAM],
        cwd=ROOT,
        env=kept | {"DIFFUSION_GPU": "false", "DIFFUSION_PORT": str(free_port())} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )
    if not done.stdout and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no file system of our own can be had here: {done.stderr.strip()}")
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    findings = [Finding.model_validate(found) for found in said["findings"]]
    assert said["ok"] == (done.returncode == 0) == all(found.state != "wrong" for found in findings)
    return done.returncode, findings


def test_a_machine_where_all_is_well_has_no_finding_and_stays_as_it_was(site: Site, tmp_path: Path) -> None:
    findings = looked(site)
    assert [found for found in findings if found.state != "ok" and found.check not in OF_THE_MACHINE] == []
    assert {found.check for found in findings} >= {"home", "disk", "permissions", "python", "torch", "prefect", "ray"}
    assert list(tmp_path.iterdir()) == []
    site.store.mkdir(parents=True)
    assert [found for found in looked(site) if found.state != "ok" and found.check not in OF_THE_MACHINE] == []
    assert list(site.home.rglob("*")) == [site.store]


def test_a_home_that_may_only_be_read(tmp_path: Path) -> None:
    home = tmp_path / "d"
    home.mkdir()
    shell = f"""exec unshare --user --map-root-user --mount sh -c 'mount -t tmpfs -o ro none {home} && exec "$@"' sh "$@" """
    code, findings = by_program({"DIFFUSION_HOME": str(home)}, shell)
    found = next(found for found in findings if found.check == "home")
    assert (code, found.state) == (1, "wrong")
    assert f"{home} cannot be written (Read-only file system)" in found.what
    assert f"mount -o remount,rw {home}" in found.mend
    assert "DIFFUSION_HOME=DIR" in found.mend


@pytest.mark.skipif(os.geteuid() == 0, reason="no permission stops root")
def test_a_home_of_somebody_else(site: Site) -> None:
    site.home.mkdir(mode=0o555)
    found = only(looked(site), "home")
    assert f"{site.home} cannot be written (Permission denied)" in found.what
    assert f"chmod u+rwx {site.home}" in found.mend


def test_a_home_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    site = Site(home=tmp_path / "file" / "d", gpu=False, port=free_port())
    assert "file is a file" in next(found for found in looked(site) if found.check == "home").what


def test_a_disk_and_a_shared_memory_that_are_small(tmp_path: Path) -> None:
    """In a space of mounts of its own, where the system lets us have one."""
    mounts = f"mount -t tmpfs -o size=1m none {tmp_path} && mount -t tmpfs -o size=64m none /dev/shm"
    shell = f"""exec unshare --user --map-root-user --mount sh -c '{mounts} && exec "$@"' sh "$@" """
    code, findings = by_program({"DIFFUSION_HOME": str(tmp_path / "d")}, shell)
    found = {found.check: found for found in findings}
    assert (code, found["disk"].state, found["shared memory"].state) == (1, "wrong", "warning")
    assert "0.0 GiB free" in found["disk"].what
    assert "--home DIR" in found["disk"].mend
    assert "64 MiB" in found["shared memory"].what
    assert "--shm-size" in found["shared memory"].mend


def test_few_open_files_and_few_addresses(tmp_path: Path) -> None:
    shell = 'ulimit -n 300; ulimit -v 40000000; exec "$@"'
    code, findings = by_program({"DIFFUSION_HOME": str(tmp_path / "d")}, shell)
    found = {found.check: found for found in findings}
    assert (code, found["open files"].state, found["address space"].state) == (1, "warning", "wrong")
    assert "300 files open" in found["open files"].what
    assert "nofile=65536" in found["open files"].mend
    assert found["address space"].mend == "`ulimit -v unlimited`"


def test_what_killed_writers_left(site: Site) -> None:
    old = time.time() - 3_600
    with staging(site.store / "bundles") as living:
        left = site.store / "runs" / ".tmp-left"
        left.mkdir(parents=True)
        (left / "half").write_bytes(bytes(2**20))
        file = site.home / ".tmp-file"
        file.touch()
        for path in (living, left, file):
            os.utime(path, (old, old))
        found = only(looked(site), "left-overs")
        assert set(left_behind(site.home)) == {left, file}
    assert found.state == "warning"
    assert found.what.startswith("2 files or folders that writers left who were killed, 1.0 MiB")
    assert str(left) in found.mend
    subprocess.run(["sh", "-c", found.mend.split("`")[1]], check=True)
    assert all(found.state == "ok" for found in looked(site) if found.check == "left-overs")


def test_keys_that_others_can_read_and_keys_that_are_damaged(site: Site) -> None:
    add(site.access.keys, "web")
    assert all(found.state == "ok" for found in looked(site) if found.check in ("permissions", "keys"))
    site.access.keys.chmod(0o644)
    found = only(looked(site), "keys")
    assert (found.state, found.mend) == ("wrong", f"`chmod 600 {site.access.keys}`")
    assert "can be read by others (mode 644)" in found.what
    subprocess.run(["sh", "-c", found.mend.strip("`")], check=True)
    site.access.keys.write_text("{")
    found = only(looked(site), "keys")
    assert "is damaged" in found.what
    assert "put back a copy" in found.mend


def test_an_endpoint_for_everybody_without_keys(site: Site) -> None:
    found = only(looked(site.model_copy(update={"host": "0.0.0.0"})), "keys")
    assert "diffusion keys add NAME" in found.mend


def test_a_file_with_secrets_that_others_can_read(site: Site) -> None:
    site.home.mkdir()
    file = site.home / "site.toml"
    file.write_text('[environment]\nAWS_SECRET_ACCESS_KEY = "hush"\n')
    file.chmod(0o640)
    found = only(looked(site), "site file")
    assert f"{file} holds AWS_SECRET_ACCESS_KEY and can be read by others (mode 640)" in found.what
    assert f"chmod 600 {file}" in found.mend
    file.write_text('[environment]\nAWS_PROFILE = "team"\n')
    assert not [found for found in looked(site) if found.check == "site file"]


def test_a_site_that_makes_no_sense_is_told_beside_what_needs_none(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('mlfow = "http://m"\nportt = 1\n')
    code, said = command("doctor", "--json", "--home", tmp_path)
    found = [each for each in json.loads(said)["findings"] if each["check"] == "site"]
    assert code == 1
    assert [each["what"].rpartition("; ")[2] for each in found] == ["did you mean mlflow?", "did you mean port?"]
    assert {each["check"] for each in json.loads(said)["findings"]} >= {"python", "torch", "versions"}


@pytest.mark.parametrize("speaks", [False, True])
def test_a_port_that_another_program_has(site: Site, speaks: bool) -> None:
    """One that says nothing, and one that speaks HTTP."""
    if speaks:
        serve = [sys.executable, "-m", "http.server", str(site.port), "--bind", "127.0.0.1"]
        with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                _until_listening(site.port)
                found = only(looked(site), "endpoint")
            finally:
                server.kill()
    else:
        with socket.socket() as other:
            other.bind(("127.0.0.1", site.port))
            other.listen()
            found = only(looked(site), "endpoint")
    assert found.state == "wrong"
    assert f"another program listens at http://127.0.0.1:{site.port}" in found.what
    assert f"sport = :{site.port}" in found.mend
    assert "DIFFUSION_PORT=N" in found.mend


def _until_listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(port)


def test_versions_that_are_not_those_of_the_lock(site: Site, tmp_path: Path) -> None:
    lock, there = tmp_path / "requirements.lock", pins(LOCK)
    lock.write_text("prefect==3.0.1 \\\n    --hash=sha256:abc\nnot-installed-at-all==1.0\n# ray==1.0\n")
    found = next(found for found in looked(site, lock) if found.check == "versions")
    assert found.state == "warning"
    assert "prefect " in found.what
    assert "(tested: 3.0.1)" in found.what
    assert "ray" not in found.what
    assert found.mend == "`pip install prefect==3.0.1`"
    missing = next(found for found in looked(site, tmp_path / "none") if found.check == "versions")
    assert "--lock FILE" in missing.mend
    assert there["prefect"].startswith("3.8.")
    assert len(there) > 200


@pytest.mark.parametrize(
    ("build", "driver", "gpu", "state", "says"),
    [
        (Build("2.13.0+cpu", None), None, None, "ok", "for CPUs"),
        (Build("2.13.0+cpu", None), "570.86", None, "warning", "NVIDIA's driver 570.86: its GPUs are not used"),
        (Build("2.13.0+cpu", None), "570.86", False, "ok", "for CPUs"),
        (Build("2.13.0+cpu", None), None, True, "wrong", "DIFFUSION_GPU=true"),
        (Build("2.13.0", "12.8"), None, None, "ok", "no GPU here"),
        (Build("2.13.0", "12.8"), None, True, "wrong", "no NVIDIA driver is loaded"),
    ],
)
def test_torchs_build_is_held_against_the_machine_and_the_site(build, driver, gpu, state, says) -> None:
    (found,) = judged(build, driver, Site(gpu=gpu))
    assert found.state == state
    assert says in found.what
    assert (found.mend != "") == (state != "ok")


def test_the_drivers_version_is_read_from_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    assert driver_version(file) == "570.86.15"


def test_what_hangs_or_fails_keeps_nothing_from_being_told(site: Site) -> None:
    def hangs(asked: Asked) -> Iterator[Finding]:
        yield ok("hangs", "half of it")
        time.sleep(60)

    def fails(asked: Asked) -> Iterator[Finding]:
        yield ok("fails", "half of it")
        raise KeyError("inside")

    def slow(asked: Asked) -> Iterator[Finding]:
        time.sleep(0.5)
        yield ok("slow", "at last")

    def says(asked: Asked) -> Iterator[Finding]:
        raise ValueError("a file is missing: write it")

    checks = [
        Check("slow", slow, 30, "wait"),
        Check("hangs", hangs, 0.3, "wait"),
        Check("fails", fails, 5, "wait"),
        Check("says", says, 5, "wait"),
    ]
    found = list(examine(Asked(site, LOCK), checks))
    assert [(each.check, each.state, each.mend) for each in found] == [
        ("slow", "ok", ""),
        ("hangs", "ok", ""),
        ("hangs", "wrong", "wait"),
        ("fails", "ok", ""),
        ("fails", "wrong", "see docs/sites.md; the check itself may be at fault"),
        ("says", "wrong", "write it"),
    ]
    assert "0.3 s" in found[2].what
    assert "KeyError" in found[4].what


def test_every_check_has_its_time_and_its_advice() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(0 < check.limit_s <= 90 and check.slow for check in CHECKS)
