"""What people hear of a run of the line: a page among Prefect's artifacts, and the site's webhook or command."""

from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.runtime import flow_run

from diffusion.adapters.mlflow_champion import CHAMPION
from diffusion.evaluation.gate.verdict import Verdict
from diffusion.store.refs import ModelRef
from flows.artifact import with_pictures
from flows.console import seconds
from flows.notify import notify
from flows.site import Site

if TYPE_CHECKING:
    from flows.pipeline import Line


def tell_failed(flow: Flow, run: FlowRun, state: State) -> None:
    """Prefect's hook: a run failed, or crashed; not one that crashed because it was being cancelled."""
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        if any(was.is_cancelling() for was in client.read_flow_run_states(run.id)):
            return
    facts = {"flow": flow.name, "run": run.name, "state": state.name or state.type.value}
    notify("failed", f"{flow.name} {run.name}: {state.message or state.name}", **facts)


def tell_verdict(model: ModelRef, verdict: Verdict | None) -> None:
    """A model was judged: it is the champion now, or is not, and why."""
    promoted = CHAMPION in model.aliases
    what = "is the champion now" if promoted else "was refused, the champion stays"
    reasons = [check.words for check in verdict.checks if not check.passed] if verdict else list(model.reasons)
    text = f"{model.name} version {model.version} {what}" + (f": {'; '.join(reasons)}" if reasons else "")
    facts = {"name": model.name, "version": model.version, "digest": model.digest, "reasons": reasons}
    notify("promoted" if promoted else "refused", text, run=flow_run.name or "", **facts)


def show(line: "Line", site: Site) -> None:
    """The page `line`: what was done and what was not and why, the pictures, the verdict, and where everything is."""
    page = markdown(line, site)
    create_markdown_artifact(page, key="line", description=f"{line.model.name} version {line.model.version}")


def markdown(line: "Line", site: Site) -> str:
    """Likewise, as Markdown."""
    model, evaluation = line.model, line.student or line.evaluation
    rows = [f"| {stage} | {seconds(took)} | {line.why.get(stage) or 'done'} |" for stage, took in line.seconds.items()]
    nothing = (
        "" if set(line.seconds) - line.why.keys() - {"deploy"} else " Nothing had changed: there was nothing to do."
    )
    verdict = "is the champion" if CHAMPION in model.aliases else "is not the champion"
    reasons = "\n".join(f"- {reason}" for reason in model.reasons)
    numbers = "\n".join(f"| {name} | {value:.5g} |" for name, value in evaluation.metrics.items())
    return "\n\n".join(
        part
        for part in (
            f"# {model.name} version {model.version} {verdict}.{nothing}",
            "\n".join(("| stage | took | |", "| --- | ---: | --- |", *rows)),
            reasons,
            with_pictures(evaluation.uri, page="![samples](grid.png)"),
            f"| measure | |\n| --- | ---: |\n{numbers}" if numbers else "",
            "\n".join(f"- {link}" for link in _links(line, site)),
        )
        if part
    )


def _links(line: "Line", site: Site) -> list[str]:
    """Where to go on from here."""
    links = []
    if line.endpoint is not None:
        links.append(f"the endpoint: <{line.endpoint.url}>")
    if site.mlflow_uri.startswith(("http://", "https://")):
        base = site.mlflow_uri.rstrip("/")
        links.append(f"[the model in MLflow]({base}/#/models/{line.model.name}/versions/{line.model.version})")
    links += [
        f"dataset {line.dataset.digest[:16]}, {line.dataset.images:,} pictures: `{line.dataset.uri}`",
        f"report: `{line.evaluation.uri}/report.md`",
        f"model: `{line.model.uri}`",
    ]
    return links
