import errno
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import typer

from diffusion.store.publish import disk_full
from flows import foreground
from flows.foreground import ending_soon, reported

HANGING = """
import threading, time
from flows import foreground
foreground._LONGEST_END_S = 0.5
threading.Thread(target=time.sleep, args=(100,)).start()  # Python waits for it
foreground.end_soon(130)
raise SystemExit(130)
"""


def test_a_program_that_a_library_keeps_from_ending_ends_with_its_own_exit_code():
    assert subprocess.run([sys.executable, "-c", HANGING], timeout=60).returncode == 130


LEAVING = """
import atexit, logging, logging.handlers, os, sys, threading, time
from flows.foreground import leaving

class AtTheEnd:
    def __del__(self):
        os.write(1, b"taken apart")

def program():
    global kept
    kept = AtTheEnd()
    log = logging.FileHandler(sys.argv[2], delay=True)
    logging.getLogger().addHandler(logging.handlers.MemoryHandler(9, target=log))
    logging.warning("kept for the end")
    atexit.register(lambda: print("a library's end"))
    print("done", end=" ")
    raise SystemExit(int(sys.argv[1]) if sys.argv[1] else None)

leaving(program)
"""


@pytest.mark.parametrize(("code", "left"), [("", 0), ("2", 2), ("130", 130)])
def test_a_program_leaves_with_its_code_all_told_and_python_not_taken_apart(tmp_path, code, left):
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", LEAVING, code, str(log)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (left, "done a library's end\n", "")
    assert log.read_text() == "kept for the end\n"


def test_a_program_that_fails_leaves_with_1_and_its_traceback():
    program = "from flows.foreground import leaving\nleaving(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


SERVER = """
import os, signal, subprocess, sys, time, types
from flows import foreground
from flows.site import keeping_ray

server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], stdout=subprocess.DEVNULL)
sys.modules["prefect.server.api.server"] = types.SimpleNamespace(
    SubprocessASGIServer=lambda: types.SimpleNamespace(server_process=server)
)
print(server.pid, flush=True)
"""
INTERRUPTED = """
foreground._LONGEST_END_S, foreground._LONELY_END_S = float(sys.argv[1]), 0.1
if sys.argv[2] == "gone":
    server.kill()
with keeping_ray():
    try:
        with foreground.ending_soon():
            raise GeneratorExit  # what a library makes of a signal
    finally:
        time.sleep(1000)  # for the server
"""


@pytest.mark.parametrize(("longest_s", "server"), [(1000, "gone"), (0.5, "there")])
def test_an_interrupted_stage_waits_for_no_server_that_is_gone_and_for_others_not_for_ever(longest_s, server):
    command = [sys.executable, "-c", SERVER + INTERRUPTED, str(longest_s), server]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    pid, said = done.stdout.splitlines()
    assert done.returncode == 130, done.stderr
    assert said.startswith("interrupted. What is finished stays")
    assert ends(pid)


def ends(pid: str) -> bool:
    """Waits for a process that is no child of ours."""
    end = time.monotonic() + 30
    while (status := Path("/proc", pid, "status")).exists() and "\nState:\tZ" not in status.read_text():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_a_killed_program_leaves_no_server():
    killed = SERVER + "foreground._end_server_with_us()\nos.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", killed], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert ends(done.stdout.strip())


def test_in_a_worker_an_interruption_ends_the_run_alone():
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ending_soon():
        raise KeyboardInterrupt
    assert threading.active_count() == threads


ENDED = """
import os, pathlib, resource, time, typer
from flows import foreground
def work(site):
    {what}
resource.setrlimit(resource.RLIMIT_AS, ({limit} * 2**20, resource.RLIM_INFINITY))
try:
    foreground.guarded(work, False, home=pathlib.Path({home!r}), gpu=False)
except typer.Exit as end:
    raise SystemExit(end.exit_code)
"""


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        (
            "os._exit(1)",
            1,
            r"was ended .*`ulimit -v` gives it 12,345 MiB.* goes on .*\nDetails: .*\.log and .*/home/ray\n",
        ),
        ("os.kill(os.getpid(), 9)", -9, "was ended .* goes on"),
        ("raise ValueError('no such thing')", 2, r"no such thing\n$"),
        ("print('done')", 0, ""),
        ("foreground._LONGEST_END_S = 0; foreground.end_soon(1); time.sleep(100)", 1, ""),
    ],
)
def test_an_end_that_nothing_in_the_process_can_tell_of_is_told(
    what: str, code: int, says: str, tmp_path: Path
) -> None:
    program = ENDED.format(what=what, limit=12_345, home=str(tmp_path / "home"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code
    assert re.search(says, done.stderr, re.DOTALL)
    assert done.stderr.count("error: ") == bool(says)


def test_what_fails_of_an_interruption_is_told_as_one(capsys):
    def fail_while_interrupted() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise ConnectionError("the server has ended, too")

    with pytest.raises(typer.Exit) as end, reported(debug=False):
        fail_while_interrupted()
    assert end.value.exit_code == 130
    assert "interrupted" in capsys.readouterr().out
    with pytest.raises(typer.Exit) as end, reported(debug=False):
        raise ConnectionError("nobody interrupted")
    assert end.value.exit_code == 1


def test_what_the_storage_waits_for_is_a_line(capsys):
    log = logging.getLogger("diffusion.storage")
    with reported(debug=False):
        log.warning("s3://b/x does not answer: asking again")
    assert capsys.readouterr().out == "! s3://b/x does not answer: asking again\n"
    assert (log.handlers, log.propagate) == ([], True)


def test_a_full_disk_is_told_in_a_sentence_whoever_met_it(capsys, tmp_path, monkeypatch):
    def said(problem: Exception, log: Path) -> str:
        with pytest.raises(typer.Exit) as end, reported(debug=False, log=log):
            raise problem
        assert end.value.exit_code == 1
        return capsys.readouterr().err

    log = tmp_path / "a.log"
    assert said(disk_full(tmp_path, "a shard"), log).startswith("error: no room for a shard in ")
    assert "Traceback" in log.read_text()
    assert said(RuntimeError("500 Internal Server Error"), log) == (
        f"error: RuntimeError: 500 Internal Server Error\nDetails: {log}\n"
    )
    locked = OSError(errno.EROFS, "Read-only file system", "/srv/store/a.lock")
    assert said(locked, log) == (
        "error: /srv/store/a.lock: Read-only file system. Let this user read and write there, and the same command goes on"
        f"\nDetails: {log}\n"
    )
    monkeypatch.setattr(foreground, "_NEARLY_FULL_BYTES", 2**63)
    (tmp_path / "b.log").mkdir()  # cannot be written either
    words = said(RuntimeError("500 Internal Server Error"), tmp_path / "b.log")
    assert re.search(r"The disk of .* is full, [\d,]+ bytes are left: free some, and the same command goes on", words)


def test_what_only_reads_makes_no_home_of_a_name_that_is_misspelt(tmp_path: Path) -> None:
    program = "import pathlib, sys\nfrom flows import console, foreground\n"
    program += "foreground.reading(lambda site: console.say('read'), False, home=pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, list(tmp_path.iterdir())) == ("read\n", [])
