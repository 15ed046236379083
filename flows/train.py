"""train: a dataset -> the last checkpoint of a finished run."""

from contextlib import ExitStack

from httpx import HTTPError
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import PrefectException
from prefect.tasks import Task

from diffusion.adapters.mlflow_runs import Tracking, log_validation, recorded
from diffusion.adapters.ray_train import TrainingFailed, train_run
from diffusion.adapters.ray_validate import named, validating
from diffusion.evaluation.quick import quick
from diffusion.recipe import EvaluateRecipe, TrainRecipe, digest_of
from diffusion.store.codecs import identity_for
from diffusion.store.refs import DatasetRef, EvaluationRef, RunRef
from diffusion.store.works import recall, work_key
from flows.artifact import with_pictures
from flows.console import progress, say, warn
from flows.origin import origin_of, started_from
from flows.precompute import precomputed
from flows.site import Site, ray_running
from flows.stage import TASK, Done, once, worth_another_try

_CURVE_ROWS = 40


@flow(name="train")
def train(
    recipe: TrainRecipe,
    dataset: DatasetRef,
    name: str = "demo",
    site: Site | None = None,
    init: str | None = None,
    watch: EvaluateRecipe = EvaluateRecipe(),
) -> RunRef:
    """Train on a dataset.  name: of the MLflow experiment.  site: None for the one the worker's environment describes.
    init: the registered model to start from, see `flows.origin`.  watch: of what `site.validates` makes a quick evaluation
    of each checkpoint; it changes nothing of the run."""
    site = site or Site.from_environment()
    site.prepare()
    return train_stage(started_from(recipe, init, dataset, site), dataset, name, site, watch).ref


def _worth_another_try(task: Task, run: TaskRun, state: State) -> bool:
    # Ray Train has replaced its workers `max_failures` times by then
    failed = isinstance(state.result(raise_on_failure=False), TrainingFailed)
    return not failed and worth_another_try(task, run, state)


@task(name="train", **TASK | {"retry_condition_fn": _worth_another_try})
def train_stage(recipe: TrainRecipe, dataset: DatasetRef, name: str, site: Site, watch: EvaluateRecipe) -> Done[RunRef]:
    key = _key(recipe, dataset)
    curve: list[dict[str, float]] = []

    def make() -> RunRef:
        precomputed(recipe, dataset, site)
        mlflow, run_dir = site.tracking(name), site.store / "runs" / key[:16]
        with (
            ray_running(site),
            recorded(mlflow, f"train {key[:8]}", key, recipe, dataset) as (run_id, log),
            progress("train", "pictures") as update,
            ExitStack() as stack,
        ):
            validation = None
            if site.validates:
                validation = stack.enter_context(
                    validating(
                        run_dir,
                        recipe,
                        dataset,
                        quick(watch, recipe),
                        reading=site.reading,
                        on_result=lambda found: _validated(mlflow, run_id, found),
                        on_event=_tell,
                    )
                )

            def on_metrics(metrics: dict) -> None:
                log(metrics)
                curve.append(metrics)
                if validation:
                    validation.turn()
                update(metrics["images_seen"], metrics["images"], note=_speed(metrics), loss=metrics["loss"])

            def on_event(event: dict) -> None:
                _tell(event)
                if validation:
                    validation.hear(event)
                if event["event"] in ("started", "resumed"):  # the rate counts from here
                    update(event["images_seen"], recipe.images)

            say(f"  train     {site.train_workers} workers on {'GPUs' if site.use_gpu else 'the CPU'}")
            run = train_run(
                recipe,
                dataset,
                run_dir,
                workers=site.train_workers,
                use_gpu=site.use_gpu,
                threads=site.threads,
                recompute=site.recompute,
                reading=site.reading,
                origin=origin_of(recipe, site),
                on_metrics=on_metrics,
                on_event=on_event,
                max_failures=3,
            )
        return run.model_copy(update={"mlflow_run_id": run_id})

    done = once("train", key, RunRef, site, make)
    if curve:
        create_table_artifact(_rows(curve), key="training-curve", description=f"Run {done.ref.digest}")
    return done


def finished(recipe: TrainRecipe, dataset: DatasetRef, site: Site) -> RunRef:
    """The run that `train` made of this dataset.  Raises ValueError where it has not."""
    ref = recall(site.store, _key(recipe, dataset), RunRef)
    if ref is None:
        raise ValueError(
            "there is no finished training run of this recipe yet: run `diffusion train` with the same options"
        )
    return ref


def _key(recipe: TrainRecipe, dataset: DatasetRef) -> str:
    codec = identity_for(recipe)  # its weights are no part of the recipe: with others it is another run
    return work_key("train", recipe, (dataset.digest, *([digest_of(codec)] if codec else [])))


def _speed(metrics: dict[str, float]) -> str:
    """What the machine makes of it, beside the progress bar's own rate."""
    return f"{metrics['mfu']:.0%} of peak, waits {metrics['wait_share']:.0%}".replace("%", " %")


def _validated(tracking: Tracking, run_id: str, found: EvaluationRef) -> None:
    """Show what a checkpoint was found to be worth.  Where that fails the run goes on, and the report is in its folder."""
    from mlflow.exceptions import MlflowException

    moment = f"{found.run.images_seen:,} pictures"
    try:
        log_validation(tracking, run_id, found, named(found))
        create_markdown_artifact(
            with_pictures(found.uri, "report.md"), key="validation", description=f"Quick look at {moment}"
        )
    except (MlflowException, PrefectException, HTTPError, OSError) as error:
        warn(f"train     what was found at {moment} is in {found.uri} alone: {error}")


def _rows(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("images_seen", "loss", "grad_norm", "lr", "images_per_s", "mfu", "wait_share", "memory_mib")
    step = -(-len(curve) // _CURVE_ROWS)
    return [{name: float(f"{row[name]:.6g}") for name in names} for row in curve[step - 1 :: step]]


def _tell(event: dict) -> None:
    """What happens to a run, for people."""
    if event["event"] == "resumed":
        changed = ", ".join(f"{name} was {then}, is {now}" for name, (then, now) in event["changed"].items())
        say(f"  train     goes on from its checkpoint at {event['images_seen']:,} pictures")
        if changed:
            warn(f"train     {changed}: the same run, but not to the last bit")
    elif event["event"] == "warm_started":
        new, dropped = ", ".join(event["new"]), ", ".join(event["dropped"])
        say(f"  train     starts from the weights of the model {event['model'][:16]}")
        if new:
            say(f"  train     new classes, drawn at first as without a class: {new}")
        if dropped:
            warn(f"train     classes of that model of which there are no pictures here are left behind: {dropped}")
    elif event["event"] == "validation_failed":
        warn(f"train     the checkpoint at {event['images_seen']:,} pictures could not be measured: {event['reason']}")
    elif event["event"] == "worker_failed":
        warn(f"train     worker {event['rank']} failed: {event['error']}")
    elif event["event"] == "damaged_sample":
        what = f"picture {event['key']} of" if event["key"] else f"{event['pictures']:,} pictures of"
        warn(f"train     {what} {event['shard']} cannot be read ({event['reason']}): others stand in")
    elif event["event"] in ("damaged_checkpoint", "damaged_sidecar"):
        warn(f"train     {event['reason']}")
