"""The commands on the site itself: what is set and where, what is wrong with it, and working on another one."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from flows.console import quiet, say
from flows.doctor.finding import Asked, Finding, wrong
from flows.foreground import looking, reported
from flows.options import Debug, Home
from flows.site import JOBS, Site
from flows.site_file import DEFAULT, OPTION, PREFIX, TABLE, hidden, in_force

app = typer.Typer()

_MARKS = {"ok": "✓ ", "warning": "! ", "wrong": "✗ "}


@app.command("site")
def site_(
    describe: Annotated[bool, typer.Option("--describe", help="Say what each setting means.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """What is set of where things run, and where: option, variable, site.toml or default.  Secrets are hidden."""

    def work(site: Site) -> None:
        found, variables = in_force(Site.model_fields, os.environ, {"home": home}, Site.model_fields["home"].default)
        values = site.model_dump(mode="json")
        for name, field in Site.model_fields.items():
            if describe:
                say(f"# {field.description}")
            source = found[name].source if name in found else DEFAULT
            say(f"{name} = {_toml(name, values[name])}{_of(source)}")
        if variables:
            say(f"\n[{TABLE}]")
        for name, setting in variables.items():
            say(f"{name} = {_toml(name, setting.value)}{_of(setting.source)}")

    looking(work, debug, home=home)


@app.command()
def doctor(
    lock: Annotated[
        Path | None, typer.Option("--lock", help="Versions to compare with. [requirements.lock of the program]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One object of JSON instead of lines.")] = False,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Look at everything that a run needs, say what is wrong and what to type.  Nothing is changed or started.  Exit code 1:
    something is wrong."""
    with reported(debug=debug):
        began, found = time.monotonic(), []
        with quiet(Path(os.devnull)):
            for finding in _findings(home, lock):
                found.append(finding)
                if not as_json:
                    _tell(finding)
        bad = [finding for finding in found if finding.state == "wrong"]
        passed_s = time.monotonic() - began
        if as_json:
            typer.echo(_json(found, passed_s))
        else:
            warned = sum(finding.state == "warning" for finding in found)
            say(f"\n{len(found)} looked at in {passed_s:.1f} s: {len(bad)} wrong, {warned} to be minded")
        if bad:
            raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def submit(context: typer.Context) -> None:
    """Run a command as a job of the Ray cluster that DIFFUSION_RAY=http://HOST:PORT names, and say what it says.
    Ctrl-C stops it.  As in `diffusion submit run --preset demo --no-wait`."""

    def work(site: Site) -> None:
        from diffusion.adapters.ray_jobs import run_job

        if not (site.ray or "").startswith(JOBS):
            raise ValueError(
                f"ray={site.ray}: jobs are taken at an address as http://HOST:8265, that of Ray's dashboard"
            )
        if not context.args:
            raise ValueError("nothing to run: name a command, as in `diffusion submit run --preset demo`")
        # what the job has its workers have, too: they are not sent it again
        variables = {**site.variables(), f"{PREFIX}RAY": "auto", f"{PREFIX}RAY_SHIP": "false"}
        code = run_job(site.ray, context.args, variables, ship=site.ray_ship, tell=say)
        if code:
            raise typer.Exit(code)

    looking(work, False)


def _findings(home: Path | None, lock: Path | None) -> Iterator[Finding]:
    """Where the settings make no sense that is told, and what needs none of them."""
    from flows.doctor.checks import CHECKS  # they load what the start of the program does not need
    from flows.doctor.examine import examine
    from flows.doctor.versions import LOCK

    checks = CHECKS
    try:
        site = Site.from_environment(home=home)
    except ValueError as error:
        for line in str(error).splitlines():
            yield wrong("site", line, "correct it; docs/sites.md has whole examples")
        site, checks = Site(), [check for check in CHECKS if check.machine]
    yield from examine(Asked(site, lock or LOCK), checks)


def _tell(finding: Finding) -> None:
    say(f"{finding.check:<14} {finding.what}", title=_MARKS[finding.state])
    if finding.mend:
        say(f"                 {finding.mend}")


def _json(found: list[Finding], passed_s: float) -> str:
    wrong = sum(finding.state == "wrong" for finding in found)
    findings = [finding.model_dump() for finding in found]
    return json.dumps({"ok": not wrong, "seconds": round(passed_s, 2), "findings": findings}, ensure_ascii=False)


def _toml(name: str, value: object) -> str:
    return '"none"' if value is None else json.dumps(hidden(name, value) if isinstance(value, str) else value)


def _of(source: str) -> str:
    return "" if source == DEFAULT else f"  # {'the option' if source == OPTION else source}"
