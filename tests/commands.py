"""The program's commands in this process, on a site that is given, without the guard that ends a process."""

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.site import Site


def on(site: Site, patch: pytest.MonkeyPatch, *modules: str, guards: tuple[str, ...] = ("guarded",)) -> None:
    """Have the commands of these modules of `flows` work on this site."""
    for module in modules:
        for guard in guards:
            patch.setattr(f"flows.{module}.{guard}", lambda work, debug, **given: work(site))


def command(*arguments: object) -> tuple[int, str]:
    """Runs one; its ValueError is the answer.  Returns exit code and what it said."""
    done = CliRunner().invoke(app, [str(part) for part in arguments])
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.exit_code, done.stdout
