"""MLflow's runs: a training or an evaluation with its recipe, data, numbers and pictures.

The same calls work on a SQLite file and on a server.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import BaseModel

from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.store.refs import DatasetRef, EvaluationRef, SweepRef
from diffusion.store.scrub import scrubbed

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

Log = Callable[[dict], None]

# MLflow's limits: characters of a parameter's value and of a dataset's digest, items in one request
_MAX_PARAM = 6_000
_MAX_DATASET_DIGEST = 36
_PARAMS_PER_REQUEST = 100
_METRICS_PER_REQUEST = 1_000
_RETRY_S = 30.0  # between tries while MLflow takes no metrics

_logger = logging.getLogger(__name__)


def open_run(tracking: Tracking, name: str, work_key: str, recipe: BaseModel, dataset: DatasetRef) -> str:
    """Start the run of a training work, or take up the one that the same work has already.  Returns its id."""
    client = connect(tracking)
    tags = {"work_key": work_key, "dataset_digest": dataset.digest, "stage": "train"}
    run_id = _find_run(client, tracking, "work_key", work_key) or _create_run(client, tracking, name, tags)
    _describe(client, run_id, tags, recipe, dataset)
    return run_id


@contextmanager
def live_metrics(tracking: Tracking, run_id: str, *, interval_s: float = 2.0) -> Iterator[Log]:
    """A function that takes {"images_seen": clock, name: number, ...} and logs the numbers in batches: when `interval_s`
    has passed since the last batch, and the rest at the end of the block.

    A resumed run repeats the work since its last checkpoint; what is logged of it already is not logged twice.
    Where MLflow fails, the numbers wait for a next try; only the one at the end raises.
    """
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    client = connect(tracking)
    logged = _last_step(client, run_id)
    waiting: list[Metric] = []
    due = time.monotonic() + interval_s

    def flush() -> None:
        while waiting:
            client.log_batch(run_id, metrics=waiting[:_METRICS_PER_REQUEST])
            del waiting[:_METRICS_PER_REQUEST]

    def log(metrics: dict) -> None:
        nonlocal due
        step = int(metrics["images_seen"])
        if step <= logged:
            return
        now = int(time.time() * 1_000)
        for name, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "images_seen":
                waiting.append(Metric(name, float(value), now, step))
        if time.monotonic() < due:
            return
        try:
            flush()
        except MlflowException as error:  # a server that is away for a while must not end a training run
            _logger.warning("MLflow took no metrics (%s); %d wait for the next try", error, len(waiting))
            due = time.monotonic() + _RETRY_S
        else:
            due = time.monotonic() + interval_s

    try:
        yield log
    finally:
        flush()


def finish_run(tracking: Tracking, run_id: str, status: str = "FINISHED", error: BaseException | None = None) -> None:
    """Close a run as FINISHED, FAILED or KILLED; what went wrong becomes its tag `error`."""
    client = connect(tracking)
    if error is not None:
        client.set_tag(run_id, "error", scrubbed(f"{type(error).__name__}: {error}")[:5_000])
    client.set_terminated(run_id, status)


@contextmanager
def recorded(
    tracking: Tracking, name: str, work_key: str, recipe: BaseModel, dataset: DatasetRef
) -> Iterator[tuple[str, Log]]:
    """The run of a training work around a block, which gets (run id, function that logs metrics).

    The run ends FINISHED with the block, FAILED when it raises, KILLED when it is interrupted.
    """
    run_id = open_run(tracking, name, work_key, recipe, dataset)
    try:
        with live_metrics(tracking, run_id) as log:
            yield run_id, log
    except Exception as error:
        finish_run(tracking, run_id, "FAILED", error)
        raise
    except BaseException as error:
        finish_run(tracking, run_id, "KILLED", error)
        raise
    finish_run(tracking, run_id)


def log_evaluation(tracking: Tracking, evaluation: EvaluationRef, recipe: BaseModel, *, again: bool = False) -> str:
    """Log a report (recipe, metrics, grid, report.json and .md) as a run below its training run, once.

    again: in place of what that run has, as where somebody changed or deleted its files.  Returns the run's id.
    """
    tags = {"bundle_digest": evaluation.bundle_digest, "stage": "evaluate"}
    name = f"evaluate {evaluation.bundle_digest[:8]}"
    return _log_found(tracking, evaluation, recipe, name, "report_digest", tags, again=again)


def log_sweep(tracking: Tracking, sweep: SweepRef, recipe: BaseModel) -> str:
    """Log a sweep (recipe, numbers, sweep.json and .md, plot, seconds) likewise.  Returns the run's id."""
    tags = {"stage": "sweep", "chosen": str(sweep.chosen)}
    return _log_found(tracking, sweep, recipe, f"sweep {sweep.digest[:8]}", "sweep_digest", tags)


def _log_found(
    tracking: Tracking,
    found: EvaluationRef | SweepRef,
    recipe: BaseModel,
    name: str,
    key: str,
    tags: dict[str, str],
    *,
    again: bool = False,
) -> str:
    """What was found of a training run as a run below it, once.  key: the tag that has its digest."""
    client = connect(tracking)
    run_id = _find_run(client, tracking, key, found.digest)
    if run_id is not None and not again and client.get_run(run_id).info.status == "FINISHED":
        return run_id
    parent = training_run(client, found)
    tags |= {key: found.digest, "run_digest": found.run.digest, "dataset_digest": found.run.dataset.digest}
    if parent is not None:
        tags["mlflow.parentRunId"] = parent.info.run_id
    run_id = run_id or _create_run(client, tracking, name, tags)
    _describe(client, run_id, tags, recipe, found.run.dataset)
    log_metrics(client, run_id, found)
    client.log_artifacts(run_id, found.uri)
    client.set_terminated(run_id)
    return run_id


def log_validation(tracking: Tracking, run_id: str, found: EvaluationRef) -> None:
    """Log the `named` numbers of a quick look to the run that trains, at the checkpoint's moment, and its grid.

    Where MLflow, or the folder of its files, fails, it is not told: training goes on.
    """
    from mlflow.exceptions import MlflowException

    from diffusion.evaluation.quick import named  # it loads torch: not for each start of the program

    try:
        client = connect(tracking)
        log_metrics(client, run_id, found.model_copy(update={"metrics": named(found)}))
        client.log_artifact(run_id, f"{found.uri}/grid.png", f"validation/{found.run.images_seen:012d}")
    except (MlflowException, OSError) as error:
        _logger.warning("MLflow took no validation (%s); it is in %s", error, found.uri)


def log_metrics(
    client: "MlflowClient", run_id: str, evaluation: EvaluationRef | SweepRef, model_id: str | None = None
) -> None:
    """Log an evaluation's numbers to its run and, if given, to the model that they are about."""
    from mlflow.entities import Metric

    now, step = int(time.time() * 1_000), evaluation.run.images_seen
    metrics = [Metric(name, value, now, step, model_id) for name, value in evaluation.metrics.items()]
    client.log_batch(run_id, metrics=metrics)


def training_run(client: "MlflowClient", evaluation: EvaluationRef | SweepRef) -> "Run | None":
    """The run that trained, where this MLflow knows it: the store may recall work that another one recorded."""
    from mlflow.exceptions import MlflowException

    if evaluation.run.mlflow_run_id is None:
        return None
    try:
        return client.get_run(evaluation.run.mlflow_run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def flatten(recipe: BaseModel) -> dict[str, str]:
    """{"unet.channels": "96", ...}: a recipe as MLflow's parameters.  What is no text is JSON, cut at MLflow's limit:
    whole recipes are in the run's recipe.json."""

    def walk(value: object, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}" if name else key)
        else:
            yield name, (value if isinstance(value, str) else json.dumps(value))[:_MAX_PARAM]

    return dict(walk(recipe.model_dump(mode="json"), ""))


def _find_run(client: "MlflowClient", tracking: Tracking, tag: str, value: str) -> str | None:
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    found = client.search_runs([experiment], f"tags.{tag} = '{value}'", max_results=1)
    return found[0].info.run_id if found else None


def _create_run(client: "MlflowClient", tracking: Tracking, name: str, tags: dict[str, str]) -> str:
    experiment = client.get_experiment_by_name(tracking.experiment).experiment_id
    return client.create_run(experiment, tags=tags, run_name=name).info.run_id


def _describe(
    client: "MlflowClient", run_id: str, tags: dict[str, str], recipe: BaseModel, dataset: DatasetRef
) -> None:
    """Write what is known before a run starts.  Safe to repeat: a process may die between creating and describing."""
    from mlflow.entities import Param, RunTag

    client.update_run(run_id, "RUNNING")
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    params = [Param(key, value) for key, value in flatten(recipe).items()]
    for start in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_REQUEST])
    client.log_inputs(run_id, [_dataset_input(dataset)])
    client.log_dict(run_id, recipe.model_dump(mode="json"), "recipe.json")


def _dataset_input(dataset: DatasetRef) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    entity = Dataset(
        name=f"{dataset.images} pictures of {dataset.resolution} px",
        digest=dataset.digest[:_MAX_DATASET_DIGEST],
        source_type=dataset.uri.split("://")[0] if "://" in dataset.uri else "local",
        source=json.dumps({"uri": dataset.uri}),
        profile=json.dumps(dataset.model_dump(mode="json", exclude={"uri"})),
    )
    return DatasetInput(entity, [InputTag("digest", dataset.digest), InputTag("mlflow.data.context", "training")])


def _last_step(client: "MlflowClient", run_id: str) -> int:
    """The highest step that any metric of the training itself has, for validations come late; -1 where there is none."""
    from diffusion.evaluation.quick import PREFIX

    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith(PREFIX)]
    return max((metric.step for name in names for metric in client.get_metric_history(run_id, name)), default=-1)
