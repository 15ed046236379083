"""A command in the foreground: libraries' output kept apart, errors in words, an end that leaves nothing running."""

import atexit
import errno
import faulthandler
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import typer

from diffusion.adapters.ray_cluster import end_processes
from diffusion.recipe import first_mistake
from diffusion.store.publish import DiskFull
from diffusion.store.scrub import scrubbed
from diffusion.store.storage import StorageUnavailable
from flows.console import alive, error, moving, quiet, say, waiting, warned
from flows.preflight import FREE_DISK_BYTES, check_home
from flows.site import Site, keeping_ray, ray_is_kept

_NEARLY_FULL_BYTES = 2**24  # where libraries fail to write, each with words of its own
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
_LONGEST_END_S = 30.0  # Prefect's own end takes up to 5 on a busy machine
_LONELY_END_S = 5.0
_INTERRUPTED = 130  # exit code
_GOES_ON = "interrupted. What is finished stays: of a run the same command goes on from there."
_told_of_interruption = threading.Event()
_waiting_shells: list[subprocess.Popen] = []  # for a sudden end of this process


def guarded(work: Callable[[Site], None], debug: bool, *, room: int = FREE_DISK_BYTES, **given: object) -> None:
    """Run `work` on the site, libraries' output in a log file, its errors told in a line, nothing left behind.  room: bytes
    that the disk must have left; what frees, revokes or takes back must not be held up by a full one."""
    with reported(debug=debug):
        site = Site.from_environment(**given)
        check_home(site, room)
        site.prepare()
        log = site.logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{sys.argv[1] if len(sys.argv) > 1 else 'run'}.log"
        signal.signal(signal.SIGTERM, _interrupt)
        with suppress(OSError):
            faulthandler.enable(open(log, "a"))  # noqa: SIM115  for as long as the process lives: where a library ends it
        heard = nullcontext() if debug else quiet(log)
        with (
            _a_sudden_end_told(log, site.home / "ray"),
            heard,
            alive(),
            reported(debug=debug, log=None if debug else log),
            keeping_ray(),
        ):
            try:
                work(site)
            except KeyboardInterrupt:
                say("stopping")
                raise
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):  # a second Ctrl-C would leave processes behind
                    signal.signal(number, signal.SIG_IGN)
                # Prefect stops its temporary server when Python exits, and says so where people read by then
                logging.getLogger("prefect").setLevel(logging.WARNING)


@contextmanager
def _a_sudden_end_told(log: Path, ray: Path) -> Iterator[None]:
    """Where this process is ended within the block, and nothing of it can speak any more, a line is said nevertheless: a
    shell waits for its end.  Ray ends it so where a process of Ray's own has died.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    why = "as where memory runs out"
    if limit != resource.RLIM_INFINITY:
        why = f"`ulimit -v` gives it {limit // 2**20:,} MiB, and Ray wants more: `ulimit -v unlimited`"
    told = (
        f"error: this process was ended from outside, or by Ray, of which a process died ({why}). What is finished stays:"
        f" the same command goes on from there.\nDetails: {log} and {ray}"
    )
    waits = ["/bin/sh", "-c", 'read -r _ || printf "%s\\n" "$0" >&2', told]
    null = subprocess.DEVNULL
    with subprocess.Popen(waits, bufsize=0, stdin=subprocess.PIPE, stdout=null, start_new_session=True) as shell:
        _waiting_shells.append(shell)
        try:
            yield
        finally:
            _end_is_no_surprise()


def _end_is_no_surprise() -> None:
    while _waiting_shells:
        with suppress(OSError):  # it was killed
            _waiting_shells.pop().stdin.write(b"\n")


def looking(work: Callable[[Site], None], debug: bool, **given: object) -> None:
    """Run `work`, which writes nothing, on the site: not a folder is made, libraries' output is dropped."""
    with reported(debug=debug):
        site = Site.from_environment(**given)
        with nullcontext() if debug else quiet(Path(os.devnull)), alive():
            work(site)


def reading(work: Callable[[Site], None], debug: bool, **given: object) -> None:
    """`guarded`; on a home that may only be read, or is not there, `looking`, for work that can do without writing."""
    with reported(debug=debug):
        home = Site.from_environment(**given).home
    if not os.access(home, os.W_OK):
        looking(work, debug, **given)
    else:
        guarded(work, debug, room=0, **given)


def prefect_configured(site: Site) -> bool:
    """Whether a server is named, that keeps what it is told."""
    return "PREFECT_API_URL" in os.environ or Path(site.environment()["PREFECT_HOME"], "profiles.toml").exists()


@contextmanager
def prefect_ready() -> Iterator[None]:
    """Import flows in this block.  Where no Prefect server is configured, a temporary one is started for this process;
    here, because a Ctrl-C would otherwise end it before the flow can note that it was interrupted.
    """
    with waiting("starting Prefect"):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            from prefect.client.orchestration import get_client

            with get_client(sync_client=True) as client:
                problem = client.api_healthcheck()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if problem is not None:
            raise ValueError(
                f"no Prefect server answers at {client.api_url} ({problem}): start it, or unset PREFECT_API_URL to do"
                " without one"
            )
        _end_server_with_us()
        yield
        signal.signal(signal.SIGTERM, _interrupt)  # importing Ray replaces it


def stay(look: Callable[[], None] | None = None, every_s: float = 60) -> None:
    """Until Ctrl-C or SIGTERM.  look: is called every so often."""
    say("\nPress Ctrl-C to stop.")
    with suppress(KeyboardInterrupt), moving():
        while True:
            if look is None:
                signal.pause()
            else:
                time.sleep(every_s)
                look()
    say("stopping")


@contextmanager
def reported(*, debug: bool, log: Path | None = None) -> Iterator[None]:
    """Errors and warnings in words.  Exit code 2: what was asked for cannot be; 1: it failed; 130: it was interrupted."""
    try:
        with warned():
            yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as problem:
        if _was_interrupted(problem):
            _told_of_interruption.set()
            say(_GOES_ON)
            raise typer.Exit(_INTERRUPTED) from None
        if debug:
            raise
        if log:
            with suppress(OSError), open(log, "a") as file:  # its disk may be full
                file.write(scrubbed(traceback.format_exc()))
        mistake = isinstance(problem, ValueError) and not isinstance(problem, UnicodeError)
        error(scrubbed(_told(problem, log, mistake or isinstance(problem, DiskFull | StorageUnavailable))))
        raise typer.Exit(2 if mistake else 1) from None


def _told(problem: BaseException, log: Path | None, in_words: bool) -> str:
    """A problem, for people.  in_words: its message says all, and what to do."""
    if in_words:
        return first_mistake(problem) if isinstance(problem, ValueError) else str(problem)
    if isinstance(problem, OSError) and problem.errno in _NO_RIGHT and problem.filename:
        why = (
            f"{problem.filename}: {problem.strerror}. Let this user read and write there, and the same command goes on"
        )
        return why if log is None else f"{why}\nDetails: {log}"
    details = "\nDetails: the same command with --debug" if log is None else f"\nDetails: {log}"
    if log and (left := shutil.disk_usage(log.parent).free) < _NEARLY_FULL_BYTES:
        details += (
            f"\nThe disk of {log.parent} is full, {left:,} bytes are left: free some, and the same command goes on"
        )
    return f"{type(problem).__name__}: {problem}{details}"


def leaving(program: Callable[[], None]) -> None:
    """Run a program, which ends by SystemExit, and leave at the end of what libraries registered for it: Python is not taken
    apart under their daemon threads, which crash then when a busy machine lets them.
    """
    code = 1

    def leave() -> None:
        with suppress(OSError):  # nobody reads any more
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # before any library does, so it is called last
    try:
        program()
    except SystemExit as done:
        code = 0 if done.code is None else done.code if isinstance(done.code, int) else 1
        end_soon(code)
        raise


def end_soon(code: int) -> None:
    """End this process with this exit code in `_LONGEST_END_S` seconds, if it has not ended by then.

    A signal to the whole process group takes Prefect's temporary server as well, and its client waits for it, minutes: then
    it ends `_LONELY_END_S` after that.
    """

    def end() -> None:
        longest = time.monotonic() + _LONGEST_END_S
        while not _server_has_ended() and time.monotonic() < longest:
            time.sleep(0.1)
        time.sleep(min(_LONELY_END_S, max(0.0, longest - time.monotonic())))
        if code == _INTERRUPTED and not _told_of_interruption.is_set():
            say(_GOES_ON)
        if (server := _temporary_server()) is not None:
            server.kill()
        end_processes()
        _end_is_no_surprise()
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def ending_soon() -> Iterator[None]:
    """Of a command in the foreground: an interruption that leaves this block ends the program soon."""
    try:
        yield
    except Exception:
        raise
    except BaseException:  # Prefect makes an exception of its own of a SIGTERM
        if ray_is_kept():
            end_soon(_INTERRUPTED)
        raise


def _temporary_server() -> subprocess.Popen | None:
    """Prefect's, where this process has started one."""
    module = sys.modules.get("prefect.server.api.server")
    return module and module.SubprocessASGIServer().server_process


def _end_server_with_us() -> None:
    """Have Prefect's temporary server ended even if this process is killed: a shell waits for our end of a pipe to close."""
    if (server := _temporary_server()) is not None:
        command = ["sh", "-c", 'read -r _; kill "$1"', "sh", str(server.pid)]
        null = subprocess.DEVNULL
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)


def _server_has_ended() -> bool:
    server = _temporary_server()
    return server is not None and server.poll() is not None


def _was_interrupted(problem: BaseException | None) -> bool:
    """Whether it is an interruption, or was raised while one was dealt with: Prefect then misses its server, which the
    same signal may have ended."""
    while problem is not None:
        if isinstance(problem, KeyboardInterrupt):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
