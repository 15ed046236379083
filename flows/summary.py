"""What the line ends with: pictures, numbers with their uncertainty, the version, the address."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.evaluation.gate.verdict import Verdict
from diffusion.evaluation.report.report import load_report
from diffusion.evaluation.report.words import average
from diffusion.evaluation.sweep.report import load_seconds, load_sweep, table
from diffusion.store.bundle_spec import SPEC_NAME, BundleSpec
from diffusion.store.refs import EvaluationRef, ModelRef, RunRef, SweepRef
from diffusion.training.checkpoint import folders_in
from diffusion.training.journal import SCORE, judged_in, ranked
from flows.console import say, seconds, warn
from flows.site import Site

if TYPE_CHECKING:
    from flows.endpoint import Endpoint
    from flows.pipeline import Line


def summary(line: "Line", site: Site, *, answers: bool) -> None:
    """Everything worth knowing about a finished line.  answers: whether its endpoint is still there afterwards."""
    say()
    taken = ", ".join(f"{s} {'reused' if s in line.reused else seconds(t)}" for s, t in line.seconds.items())
    say(f"  {seconds(sum(line.seconds.values()))}  ({taken})", title=line.model.name)
    best_on_the_way(line.run)
    if line.sweep is not None:
        tried(line.sweep)
    measured(line.evaluation)
    if line.student is not None:
        say("  student")
        measured(line.student)
    from flows.register import judged  # Prefect has its folder by now

    registered(line.model, judged(line.model, site))
    uri = shlex.quote(site.mlflow_uri)
    program = Path(sys.executable).parent / "mlflow"
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    say(f"  mlflow     {program} ui --host 127.0.0.1 --backend-store-uri {uri}")
    if line.endpoint is not None and answers:
        answering(line.endpoint)
    elif line.endpoint is not None:
        say("  endpoint   answered, and ends with this command; `diffusion deploy` starts it again")


def trained(run: RunRef) -> None:
    """Where a run's last checkpoint is, and which before it may be better."""
    say(f"  checkpoint {run.uri}")
    say(f"  digest     {run.digest}")
    best_on_the_way(run)


def best_on_the_way(run: RunRef) -> None:
    """Which of the checkpoints before the end, of those that are there and were measured beside training, did best."""
    last = Path(run.uri)
    there = [int(folder.name) for folder in folders_in(last.parent) if folder != last]
    kinds = list(judged_in(last.parent.parent / "metrics.jsonl").among(there).scores.values())
    if kinds and (scores := kinds[-1]):
        best = ranked(scores)[0]
        of = f"{len(scores)} that were" if len(scores) > 1 else "the one that was"
        say(f"  best       of {of} measured on the way: at {best:,} images, {SCORE} {scores[best]:.4g}")
        say(f"             `--set evaluate.images={best}` evaluates it as the run's end is evaluated, and registers it")


def tried(sweep: SweepRef, *, alone: bool = False) -> None:
    """Which way of drawing was chosen, and why.  alone: with all that were tried, and how to have this one without them."""
    found, seconds = load_sweep(sweep.uri, sweep.digest), load_seconds(sweep.uri)
    if alone:
        rows = table(found, seconds)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            say("  " + "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    for name, number in (("chosen", found.chosen), ("best", found.best)):
        one = found.tried[number]
        taken = f"{one.evaluations} evaluations, {seconds[number]:.2g} s a picture"
        say(f"  {name:<10} {one.setting}")
        say(f"             Frechet {one.value:.4g} ± {one.standard_error:.2g} ({one.samples:,} samples), {taken}")
    if not found.certain:
        say("             not certain to be within sweep.tolerance of the others: draw more (--set sweep.samples=N)")
    say(f"  sweep      {sweep.uri}/sweep.md")
    if alone:
        say(
            "  goes on    `diffusion evaluate`, `register` and `run` with the same options use the chosen one; without:"
        )
        say(f"             {sweep.chosen.options}")


def measured(evaluation: EvaluationRef) -> None:
    """Where the grid is, and the numbers."""
    say(f"  samples    {evaluation.uri}/grid.png")
    say(f"  report     {evaluation.uri}/report.md")
    report = load_report(evaluation.uri, evaluation.digest)
    if report.reconstruction is not None:
        say(f"  model      {average(report.ema, report.reconstruction)}")
    if report.guide is not None:
        guide = report.guide
        say(f"  guide      at {guide.checkpoint.images_seen:,} images, {average(guide.ema, guide.reconstruction)}")
    if report.frechet is not None:
        found = report.frechet
        interval = f"{found.confidence:.0%} interval {found.low:.4g} to {found.high:.4g}"
        made = f"{found.identity.samples:,} samples, {found.identity.extractor.name}"
        say(f"  Frechet    {found.value:.4g} ± {found.standard_error:.2g} ({interval}; {made})")
    if report.floor is not None:
        say(f"             {report.floor.value:.4g} ± {report.floor.spread:.2g} for real pictures in their place")
    for level in report.held_out:
        say(f"  held out   {_shown(level.loss, level.interval and level.standard_error)} at sigma {level.sigma:g}")
    if report.bound is not None:
        found = report.bound
        number = _shown(found.value, found.standard_error)
        say(f"  bound      {number} bits per value ({found.identity.pictures:,} held-out pictures)")
    for problem in report.problems:
        warn(f"problem    {problem}")


def _shown(value: float | None, error: float | None) -> str:
    """A number and its standard error, which few pictures have none of."""
    if value is None:
        return "not finite"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def registered(model: ModelRef, verdict: Verdict | None) -> None:
    """The version, its aliases, and why: each check of the gate, or where they are not known what the version says."""
    say(f"  model      {model.name} version {model.version} ({', '.join(model.aliases) or 'no alias'})")
    if verdict is None:
        for reason in model.reasons:
            say(f"  gate       {reason}")
        return
    say(f"  gate       {'passed' if verdict.passed else 'refused'}; {verdict.beside}")
    for check in verdict.checks:
        say(f"    {'passed ' if check.passed else 'refused'}  {check.words}")


def answering(endpoint: "Endpoint") -> None:
    """The address, and a request to try."""
    label = BundleSpec.model_validate_json(Path(endpoint.model.uri, SPEC_NAME).read_bytes()).classes[0]
    body = shlex.quote(json.dumps({"label": label, "seed": 1}, ensure_ascii=False))
    target = f"{endpoint.url}/v1/images/generations -o picture.png"
    slots = f", {endpoint.slots} pictures at once" if endpoint.slots else ""
    say(f"  endpoint   {endpoint.url}  serves {endpoint.model.name} version {endpoint.model.version}{slots}")
    shares = {canary.version: f", {canary.share:.3g} of the requests" for canary in endpoint.lineup.canaries}
    for name, model in list(endpoint.lineup.names().items())[1:]:
        share = shares.get(model.version, "") if model.name == endpoint.model.name else ""
        say(f"  beside it  {name}: version {model.version}{share}")
    headers = "-H 'Content-Type: application/json' -H 'Accept: image/png'"
    if endpoint.guarded:
        headers += ' -H "Authorization: Bearer $KEY"'
    say(f"  try        curl -fsS {target} {headers} -d {body}")
