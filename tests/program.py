"""The program as a person runs it: on a machine of their own, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.processes import below, command_of, with_variable

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Place:
    """A user's machine: their own HOME and TMPDIR, which stay empty, and the folder they gave to the program."""

    root: Path
    also: Mapping[str, str] = field(default_factory=dict)  # variables of theirs

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
            **self.also,
        }

    def strays(self) -> list[Path]:
        """Files outside the home."""
        return [path for folder in ("user", "tmp") for path in (self.root / folder).rglob("*")]

    def processes(self) -> list[int]:
        """Those that live and were started from here."""
        return sorted({*with_variable("DIFFUSION_HOME", str(self.home)), *below(self.home)})

    def wait_for_end(self, timeout_s: float = 30) -> list[str]:
        """Command lines of the processes that are left after a while."""
        end = time.monotonic() + timeout_s
        while (left := [line for pid in self.processes() if (line := command_of(pid))]) and time.monotonic() < end:
            time.sleep(0.2)
        return left

    def published(self) -> dict[str, int]:
        """Every file of the store with the time of its last change; not the locks."""
        files = (path for path in (self.home / "store").rglob("*") if path.is_file() and path.suffix != ".lock")
        return {str(path): path.stat().st_mtime_ns for path in files}


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
