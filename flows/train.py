"""train: a dataset -> the last checkpoint of a finished run.  distill: the same of a student, that asks its teacher."""

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from diffusion.adapters.mlflow_runs import recorded
from diffusion.recipe import EvaluateRecipe, TrainRecipe
from diffusion.store.averages import moments_read
from diffusion.store.bundle_spec import bundle_path
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.training.retention import Keep
from flows.artifact import Progress
from flows.console import progress, say, warn
from flows.finished import run_copies, run_folder, train_key
from flows.origin import origin_of, started_from
from flows.precompute import precomputed
from flows.retries import TASK
from flows.site import Site, ray_running
from flows.stage import Done, once

_CURVE_ROWS = 40


@flow(name="train")
def train(
    recipe: TrainRecipe,
    dataset: DatasetRef,
    name: str = "demo",
    site: Site | None = None,
    evaluate: EvaluateRecipe = EvaluateRecipe(),
    init: str | None = None,
    widths: tuple[float, ...] = (),
) -> RunRef:
    """Train on a dataset.  name: of the MLflow experiment.  site: None for the one the worker's environment describes.
    evaluate: what will be asked of the run: what it reads of the checkpoints stays, and the quick looks at them, where
    `site.validates`, are like it.  init: the registered model to start from, see `flows.origin`.  widths: of
    the averages that a sweep of the run will try.
    """
    site = site or Site.from_environment()
    site.prepare()
    return train_stage(started_from(recipe, init, dataset, site), dataset, name, site, evaluate, widths).ref


@task(name="train", **TASK)
def train_stage(
    recipe: TrainRecipe,
    dataset: DatasetRef,
    name: str,
    site: Site,
    evaluate: EvaluateRecipe,
    widths: tuple[float, ...] = (),
) -> Done[RunRef]:
    return _trained("train", recipe, dataset, name, site, evaluate, widths)


@task(name="distill", **TASK)
def distill_stage(
    recipe: TrainRecipe, dataset: DatasetRef, name: str, site: Site, evaluate: EvaluateRecipe
) -> Done[RunRef]:
    """recipe: of a student, whose teacher's bundle lies in the store."""
    return _trained("distill", recipe, dataset, name, site, evaluate)


def _trained(
    stage: str,
    recipe: TrainRecipe,
    dataset: DatasetRef,
    name: str,
    site: Site,
    evaluate: EvaluateRecipe,
    widths: tuple[float, ...] = (),
) -> Done[RunRef]:
    key = train_key(recipe, dataset)
    read = moments_read(evaluate, recipe, widths)
    keep = Keep(last=site.keep_last, images=site.keep_images, best=site.keep_best, moments=read)
    curve: list[dict[str, float]] = []

    def make() -> RunRef:
        from diffusion.adapters.ray_train import train_run  # seconds of loading Ray: not where there is nothing to do
        from flows.validation import watched

        precomputed(recipe, dataset, site)
        mlflow, run_dir = site.tracking(name), run_folder(key, site)

        def tell(event: dict) -> None:
            _tell(stage, event)

        with (
            ray_running(site),
            recorded(mlflow, f"{stage} {key[:8]}", key, recipe, dataset) as (run_id, log),
            progress(stage, "pictures") as update,
            watched(site, run_dir, recipe, dataset, evaluate, shown=(mlflow, run_id), on_event=tell) as validation,
        ):
            bar = Progress(f"{stage}-progress", f"{name}: pictures seen, of {recipe.images:,}")

            def on_metrics(metrics: dict) -> None:
                log(metrics)
                curve.append(metrics)
                if validation:
                    validation.turn()
                update(metrics["images_seen"], metrics["images"], note=_speed(metrics), loss=metrics["loss"])
                bar(metrics["images_seen"], metrics["images"])

            def on_event(event: dict) -> None:
                tell(event)
                if validation:
                    validation.hear(event)
                if event["event"] in ("started", "resumed"):  # the rate counts from here
                    update(event["images_seen"], recipe.images)

            workers = site.train_workers
            told = " to ".join(map(str, workers)) if isinstance(workers, tuple) else workers
            say(f"  {stage:<9} {told} workers on {'GPUs' if site.use_gpu else 'the CPU'}")
            run = train_run(
                recipe,
                dataset,
                run_dir,
                workers=workers,
                use_gpu=site.use_gpu,
                threads=site.threads,
                recompute=site.recompute,
                shard_weights=site.shard_weights,
                reading=site.reading,
                keep=keep,
                copies=run_copies(key, site),
                teacher=bundle_path(site.store, recipe.lesson.teacher) if recipe.lesson else None,
                origin=origin_of(recipe, site),
                on_metrics=on_metrics,
                on_event=on_event,
                max_failures=3,
            )
        return run.model_copy(update={"mlflow_run_id": run_id})

    same = "the same dataset, the same recipe"
    done = once(stage, key, RunRef, site, make, same=same, place=site.runs)
    if curve:
        create_table_artifact(_rows(curve), key="training-curve", description=f"Run {done.ref.digest}")
    return done


def _speed(metrics: dict[str, float]) -> str:
    """What the machine makes of it, beside the bar's own rate."""
    return f"{metrics['mfu']:.0%} of peak, waits {metrics['wait_share']:.0%}".replace("%", " %")


def _rows(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    names = ("images_seen", "loss", "grad_norm", "lr", "images_per_s", "mfu", "wait_share", "memory_mib")
    step = -(-len(curve) // _CURVE_ROWS)
    return [{name: float(f"{row[name]:.6g}") for name in names} for row in curve[step - 1 :: step]]


def _tell(stage: str, event: dict) -> None:
    """What happens to a run, for people."""
    if event["event"] == "resumed":
        changed = ", ".join(f"{name} was {then}, is {now}" for name, (then, now) in event["changed"].items())
        say(f"  {stage:<9} goes on from its checkpoint at {event['images_seen']:,} pictures")
        if changed:
            warn(f"{stage:<9} {changed}: the same run, but not to the last bit")
    elif event["event"] == "warm_started":
        new, dropped = ", ".join(event["new"]), ", ".join(event["dropped"])
        say(f"  {stage:<9} starts from the weights of the model {event['model'][:16]}")
        if new:
            say(f"  {stage:<9} new classes, drawn at first as without a class: {new}")
        if dropped:
            warn(f"{stage:<9} classes of that model of which there are no pictures here are left behind: {dropped}")
    elif event["event"] == "validation_failed":
        warn(f"{stage:<9} the checkpoint at {event['images_seen']:,} pictures could not be measured: {event['reason']}")
    elif event["event"] == "checkpoint_failed":
        warn(f"{stage:<9} nor was the checkpoint at {event['images_seen']:,} pictures saved: {event['reason']}")
    elif event["event"] == "resized":
        say(f"  {stage:<9} on {event['to']} workers instead of {event['from']}")
    elif event["event"] == "worker_failed":
        warn(f"{stage:<9} worker {event['rank']} failed: {event['error']}")
    elif event["event"] == "damaged_sample":
        what = f"picture {event['key']} of" if event["key"] else f"{event['pictures']:,} pictures of"
        warn(f"{stage:<9} {what} {event['shard']} cannot be read ({event['reason']}): others stand in")
    elif event["event"] == "fetched_checkpoint":
        say(f"  {stage:<9} fetched the checkpoint at {event['images_seen']:,} pictures from {event['uri']}")
    elif event["event"] in ("damaged_checkpoint", "damaged_sidecar", "checkpoint_not_copied"):
        warn(f"{stage:<9} {event['reason']}")
