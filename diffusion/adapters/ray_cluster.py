"""Ray, started with the options that keep it quiet, local and inside our own folder."""

import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

_SOCKET_LIMIT = 107  # bytes of a Unix socket's path; below `home` we and Ray add about 64
_RAY_SUFFIX = 64
_started: list[subprocess.Popen] = []  # Ray's processes of this one


def ray_environment(home: Path) -> dict[str, str]:
    """Environment variables for Ray: no telemetry, tokens kept in `home`, Train and replicas asked often enough.

    See `flows.site`.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_TOKEN_PATH": str(home / "auth_token"),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "diffusion.adapters.ray_serve_proxy.middlewares",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    }


def sent() -> dict[str, list[str]]:
    """Ray's runtime environment that sends this program to nodes, to be imported in place of what they have of it.
    Libraries are there, in the versions that this program has."""
    root = Path(__file__).parents[2]
    return {"py_modules": [str(root / package) for package in ("diffusion", "flows")], "excludes": ["__pycache__"]}


@contextmanager
def connected(address: str, *, ship: bool) -> Iterator[None]:
    """A cluster that runs, for the length of the block.  ship: send this program to it."""
    import ray

    ray.init(address=address, log_to_driver=False, runtime_env=sent() if ship else None)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def local_ray(home: Path, *, cpus: int | None = None) -> Iterator[None]:
    """A Ray of our own for the length of the block.  A Ray that already runs in this process is used and left alone.

    Its files lie below `home`, or below /tmp where Ray cannot use that path: it would be too long for a socket, or is not
    ASCII.  They are deleted at the end; in `home` they stay after an error, for their logs.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)  # Ray opens its own folder in here to everybody
    token = home / "auth_token"
    for key, value in ray_environment(home).items():
        os.environ.setdefault(key, value)
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(os.urandom(32).hex())
    path = str(home.resolve())
    elsewhere = not path.isascii() or len(path) + _RAY_SUFFIX > _SOCKET_LIMIT
    outer = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")) if elsewhere else home.resolve()
    temp_dir = outer / "r"
    start = partial(
        ray.init,
        address="local",
        num_cpus=cpus or max(4, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(temp_dir),
    )
    litter = outer if elsewhere else None
    watched = ExitStack()
    try:
        with _groups_of_their_own(watched):
            try:
                start()
            except Exception as error:  # Ray's own type for it: its patience of 30 s cannot be set
                if "timed out during startup" not in str(error):
                    raise
                ray.shutdown()
                start()
        session = temp_dir / ray.get_runtime_context().get_session_name()
        yield
        litter = litter or session
    finally:
        ray.shutdown()
        watched.close()
        _started.clear()
        if litter:
            shutil.rmtree(litter, ignore_errors=True)


def end_processes() -> None:
    """End what Ray runs for this process and all its children, at once: for where `ray.shutdown` cannot be waited for."""
    for process in _started:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


@contextmanager
def _groups_of_their_own(watched: ExitStack) -> Iterator[None]:
    """Processes that Ray starts in the block lead process groups.  A signal to our group, as of a service manager, would end
    them under us otherwise, and Ray ends at once a process that misses them.

    They are killed at the end of `watched` or of this process, however that ends, and though Ray has not started by then.
    """
    from ray._private import services

    theirs = services.ConsolePopen

    def start(*args: object, **kwargs: object) -> subprocess.Popen:
        process = theirs(*args, **kwargs, process_group=0)
        _started.append(process)
        _end_with_us(process, watched)
        return process

    services.ConsolePopen = start
    try:
        yield
    finally:
        services.ConsolePopen = theirs


def _end_with_us(process: subprocess.Popen, watched: ExitStack) -> None:
    """What leads a group is killed with it at the end of `watched` or of this process.  In the group a shell waits for our
    end of a pipe, and then kills its own group: no other can have that number by then.

    Where its raylet is killed, as Ray does itself to one that a busy machine keeps from ending within a second, the raylet's
    agents ask a GCS that is gone for a minute before they see that they are alone.
    """
    command = ["/bin/sh", "-c", 'trap "" HUP INT TERM; read -r _; kill -9 0']
    null = subprocess.DEVNULL
    with suppress(ProcessLookupError, PermissionError):  # it has ended, and all of its group
        shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, process_group=process.pid)
        watched.enter_context(shell)
