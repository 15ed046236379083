"""train: a dataset -> the last checkpoint of a finished run."""

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from diffusion.adapters.mlflow_runs import recorded
from diffusion.adapters.ray_train import TrainingFailed, train_run
from diffusion.recipe import TrainRecipe, digest_of
from diffusion.store.codecs import identity_for
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.store.works import recall, work_key
from flows.console import progress, say, warn
from flows.origin import origin_of, started_from
from flows.precompute import precomputed
from flows.site import Site, ray_running
from flows.stage import TASK, Done, once, worth_another_try

_CURVE_ROWS = 40


@flow(name="train")
def train(
    recipe: TrainRecipe, dataset: DatasetRef, name: str = "demo", site: Site | None = None, init: str | None = None
) -> RunRef:
    """Train on a dataset.  name: of the MLflow experiment.  site: None for the one the worker's environment describes.
    init: the registered model to start from, see `flows.origin`."""
    site = site or Site.from_environment()
    site.prepare()
    return train_stage(started_from(recipe, init, dataset, site), dataset, name, site).ref


def _worth_another_try(task: Task, run: TaskRun, state: State) -> bool:
    # Ray Train has replaced its workers `max_failures` times by then
    failed = isinstance(state.result(raise_on_failure=False), TrainingFailed)
    return not failed and worth_another_try(task, run, state)


@task(name="train", **TASK | {"retry_condition_fn": _worth_another_try})
def train_stage(recipe: TrainRecipe, dataset: DatasetRef, name: str, site: Site) -> Done[RunRef]:
    key = _key(recipe, dataset)
    curve: list[dict[str, float]] = []

    def make() -> RunRef:
        precomputed(recipe, dataset, site)
        mlflow = site.tracking(name)
        with (
            ray_running(site),
            recorded(mlflow, f"train {key[:8]}", key, recipe, dataset) as (run_id, log),
            progress("train", "pictures") as update,
        ):

            def on_metrics(metrics: dict) -> None:
                log(metrics)
                curve.append(metrics)
                update(metrics["images_seen"], metrics["images"], loss=metrics["loss"])

            def on_event(event: dict) -> None:
                _tell(event)
                if event["event"] in ("started", "resumed"):  # the rate counts from here
                    update(event["images_seen"], recipe.images)

            say(f"  train     {site.train_workers} workers on {'GPUs' if site.use_gpu else 'the CPU'}")
            run = train_run(
                recipe,
                dataset,
                site.store / "runs" / key[:16],
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


def _rows(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("images_seen", "loss", "grad_norm", "lr", "images_per_s")
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
    elif event["event"] == "worker_failed":
        warn(f"train     worker {event['rank']} failed: {event['error']}")
    elif event["event"] == "damaged_sample":
        what = f"picture {event['key']} of" if event["key"] else f"{event['pictures']:,} pictures of"
        warn(f"train     {what} {event['shard']} cannot be read ({event['reason']}): others stand in")
    elif event["event"] in ("damaged_checkpoint", "damaged_sidecar"):
        warn(f"train     {event['reason']}")
