"""Registering under the gate: judged against the champion there is, and judged again where another was faster."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.exceptions import MlflowException
from pydantic import ValidationError

from diffusion.adapters.mlflow_card import VERDICT_NAME
from diffusion.adapters.mlflow_champion import CHAMPION, WITHDRAWN, Overtaken
from diffusion.adapters.mlflow_registry import aliases_of, register, version_of
from diffusion.adapters.mlflow_runs import log_evaluation
from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.evaluation.gate.again import unlike
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.gate.verdict import Verdict
from diffusion.evaluation.report.report import FILE as REPORT_NAME
from diffusion.evaluation.report.report import Report, load_report
from diffusion.recipe import GateRecipe, Recipe, digest_of
from diffusion.serving.engine import Engine
from diffusion.serving.latency import measure
from diffusion.store.bundle import load_bundle
from diffusion.store.refs import EvaluationRef, ModelRef

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRIES = 8  # of the races that one registration may lose


def settle(
    tracking: Tracking,
    evaluation: EvaluationRef,
    recipe: Recipe,
    device: str = "cpu",
    again: Callable[[str, Report, Report], Report | None] = lambda version, champion, challenger: None,
) -> ModelRef:
    """Judge an evaluated bundle and register it as recipe.name; likewise again while others move the alias.

    device: on which its latency is measured, where recipe.gate limits that.  again: measures the champion, a version with
    its report, as the challenger was, where that is of other pictures or another recipe; None: that cannot be.
    Raises Overtaken where the alias moved TRIES times.
    """
    challenger, name = load_report(evaluation.uri, evaluation.digest), recipe.name
    latency = None
    if recipe.gate.max_latency_s is not None and not challenger.problems:
        bundle = load_bundle(evaluation.bundle_uri, device, digest=evaluation.bundle_digest)
        latency = measure(Engine(bundle, slots=recipe.serve.slots, queue=recipe.serve.queue))
    for left in reversed(range(TRIES)):
        against = champion_version(tracking, name)
        champion = against and _champion(tracking, name, against, challenger)
        if champion is challenger:  # what MLflow has cannot be read, and may be this very report
            log_evaluation(tracking, evaluation, recipe.evaluate, again=True)
        told = unlike(challenger, champion) if champion else ()
        anew = again(against, champion, challenger) if told else None
        judged = verdict(
            challenger,
            anew or champion,
            recipe.gate,
            against=against,
            anew=told if anew else (),
            withdrawn=_withdrawn(tracking, name, challenger),
            latency=latency,
        )
        try:
            return register(tracking, evaluation, judged, name, recipe.evaluate, recipe.data_licence)
        except Overtaken:
            if not left:
                raise
    raise AssertionError("unreachable")


def champion_report(tracking: Tracking, name: str) -> Report | None:
    """The report by which the present champion of the model `name` was last judged; None where it has no champion."""
    version = champion_version(tracking, name)
    return None if version is None else report_of(tracking, name, version)


def champion_version(tracking: Tracking, name: str) -> str | None:
    """Which version of the model `name` is its champion; None where it has none, or is not registered."""
    return (aliases_of(connect(tracking), name) or {}).get(CHAMPION)


def report_of(tracking: Tracking, name: str, version: str) -> Report:
    """The report by which a version of the model `name` was last judged.  Raises ValueError where it has none."""
    client = connect(tracking)
    tags = client.get_model_version(name, version).tags
    if "evaluation_run" not in tags:
        raise ValueError(
            f"the champion of {name!r}, version {version}, has no report: `diffusion register` did not make it. Give the"
            f" alias {CHAMPION} to a version that has one, or remove it."
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            client.download_artifacts(run_id := tags["evaluation_run"], REPORT_NAME, folder)
            # the run's own digest: the version's tags change one after the other when it is judged anew
            return load_report(folder, client.get_run(run_id).data.tags["report_digest"])
        except (OSError, MlflowException) as error:
            if _kept(client, run_id, REPORT_NAME):
                raise
            raise ValueError(
                f"{REPORT_NAME} of MLflow run {run_id}, by which version {version} of {name!r} was judged, is gone from"
                f" there. Evaluate and register that model again."
            ) from error
        except ValidationError as error:
            raise ValueError(
                f"version {version} of {name!r} was measured by an earlier version of this program, and its numbers are not"
                f" compared with today's: evaluate and register its run again"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{REPORT_NAME} of MLflow run {run_id} is not the one that version {version} of {name!r} was judged by:"
                f" it was changed there. Evaluate and register that model again."
            ) from error


def verdict_of(tracking: Tracking, name: str, version: str) -> Verdict | None:
    """How the gate last judged a version of the model `name`; None where it was registered before verdicts were kept."""
    client = connect(tracking)
    run_id = client.get_model_version(name, version).tags.get("evaluation_run")
    if run_id is None or not _kept(client, run_id, VERDICT_NAME):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Verdict.model_validate_json(Path(client.download_artifacts(run_id, VERDICT_NAME, folder)).read_bytes())


def _kept(client: "MlflowClient", run_id: str, name: str) -> bool:
    """Whether MLflow has this file of a run; somebody may have deleted it there, or the run."""
    try:
        return name in {item.path for item in client.list_artifacts(run_id)}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def stands(tracking: Tracking, model: ModelRef, gate: GateRecipe) -> bool:
    """Whether the last verdict on a registered model is the one that it would have now: by this gate, and of a champion that
    is so still, or of a model refused beside the champion that there is."""
    judged = verdict_of(tracking, model.name, model.version)
    if judged is None or judged.gate != digest_of(gate):
        return False
    champion = champion_version(tracking, model.name)
    if judged.passed:
        return champion == model.version and _readable(tracking, model)
    withdrawn = WITHDRAWN in connect(tracking).get_model_version(model.name, model.version).tags
    return champion == judged.against and withdrawn == any(check.name == WITHDRAWN for check in judged.checks)


def _readable(tracking: Tracking, model: ModelRef) -> bool:
    """Whether others can be held against its report, as MLflow has it."""
    try:
        report_of(tracking, model.name, model.version)
    except ValueError:
        return False
    return True


def _champion(tracking: Tracking, name: str, version: str, challenger: Report) -> Report:
    """The champion's report; the challenger's own where they are one bundle whose report cannot be read: it may be of an
    earlier program, or changed or deleted in MLflow, and measuring or registering it anew is the remedy."""
    digest = connect(tracking).get_model_version(name, version).tags.get("bundle_digest")
    try:
        return report_of(tracking, name, version)
    except (ValueError, OSError, MlflowException):
        if digest != challenger.bundle_digest:
            raise
        return challenger


def _withdrawn(tracking: Tracking, name: str, challenger: Report) -> str | None:
    found = version_of(connect(tracking), name, challenger.bundle_digest)
    return found and found.tags.get(WITHDRAWN)
