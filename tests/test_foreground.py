import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from diffusion.store.publish import disk_full
from flows import foreground
from flows.foreground import reported

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


ENDED = """
import os, pathlib, resource, typer
from flows.foreground import guarded
def work(site):
    {what}
resource.setrlimit(resource.RLIMIT_AS, ({limit} * 2**20, resource.RLIM_INFINITY))
try:
    guarded(work, False, home=pathlib.Path({home!r}), gpu=False)
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
    monkeypatch.setattr(foreground, "_NEARLY_FULL_BYTES", 2**63)
    (tmp_path / "b.log").mkdir()  # cannot be written either
    words = said(RuntimeError("500 Internal Server Error"), tmp_path / "b.log")
    assert re.search(r"The disk of .* is full, [\d,]+ bytes are left: free some, and the same command goes on", words)
