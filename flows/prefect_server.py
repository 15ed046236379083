"""A Prefect server of our own, with its page and its scheduler, for as long as a command runs; or the one that is named.

A temporary server, which Prefect starts by itself for a flow without one, fires no schedule and shows no page.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.console import waiting
from flows.preflight import PREFECT_PORTS
from flows.site import Site

PORT = 4200  # Prefect's own habit
_START_S = 120.0
_END_S = 10.0
_LAST = 2_000  # characters of its log


def address_for(site: Site) -> tuple[str, bool]:
    """The API's URL, and whether it is ours to start: PREFECT_API_URL names another.  It is put into the environment, so do
    this before Prefect is imported."""
    if named := os.environ.get("PREFECT_API_URL"):
        return named, False
    url = f"http://127.0.0.1:{_free_port(site)}/api"
    os.environ["PREFECT_API_URL"] = url
    return url, True


def page(url: str) -> str:
    """The address for people."""
    return url.removesuffix("/").removesuffix("/api")


@contextmanager
def server(url: str, site: Site) -> Iterator[subprocess.Popen]:
    """Our server for the length of the block.  It ends with this process, however that ends.  Raises RuntimeError where it
    does not start."""
    log = site.logs / "prefect-server.log"
    port = url.rpartition(":")[2].partition("/")[0]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    environment = os.environ | {
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(site.home / "prefect" / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # the place of a run that died is free again though the server was started anew meanwhile
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: its clients would miss it
        )
    try:
        with _ended_with_us(process):
            with waiting("starting Prefect's server"):
                _wait(process, url, log)
            yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a server is healthy."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=timeout_s) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while not answers(url):
        if process.poll() is not None or time.monotonic() > end:
            how = "ended" if process.poll() is not None else f"does not answer after {_START_S:g} s"
            last = log.read_text(errors="replace")[-_LAST:].strip()
            raise RuntimeError(f"Prefect's server {how}; its log, {log}, ends with:\n{last}")
        time.sleep(0.2)


@contextmanager
def _ended_with_us(process: subprocess.Popen) -> Iterator[None]:
    """A shell waits for our end of a pipe to close, whatever closes it."""
    command = ["/bin/sh", "-c", 'read -r word && exit; kill "$1"; sleep 5; kill -9 "$1"', "sh", str(process.pid)]
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True, bufsize=0
    ) as shell:
        try:
            yield
        finally:
            with suppress(OSError):
                shell.stdin.write(b"let it be\n")


def _free_port(site: Site) -> int:
    for port in (PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found = probe.getsockname()[1]
        if found != site.port and found not in PREFECT_PORTS:
            return found
    return _free_port(site)
