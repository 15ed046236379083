"""A real MLflow server on loopback, in processes of its own."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffusion.adapters.mlflow_tracking import mlflow_environment
from tests.ports import free_port


class MlflowServer:
    """A server that may be killed and started again at the same address."""

    def __init__(self, folder: Path, arguments: tuple[str, ...], variables: Mapping[str, str]) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments, self._variables = arguments, variables
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | mlflow_environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        log = self.folder / "log"
        with open(log, "ab") as written:
            self._process = subprocess.Popen(
                [*command, "--workers", "1", *self._arguments],
                cwd=self.folder,
                env=environment | self._variables,
                stdout=written,
                stderr=written,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not answers(f"{self.url}/health"):
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def end(self, by: signal.Signals = signal.SIGTERM) -> None:
        """End it with all its processes."""
        os.killpg(self._process.pid, by)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def answers(url: str) -> bool:
    """Whether a server is there and well."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


@contextmanager
def mlflow_server(folder: Path, *arguments: str, variables: Mapping[str, str] = {}) -> Iterator[MlflowServer]:
    """A server for the length of the block.  folder: is made.  variables: of its environment, beside ours."""
    folder.mkdir()
    server = MlflowServer(folder, arguments, variables)
    try:
        server.start()
        yield server
    finally:
        server.end()
