"""Training on N workers with Ray Train: a thin wrapper over `training.loop.train`, which works without it.

The run's folder is on storage that all workers share:
    checkpoints/<images_seen>/   published by `training.saving`; the only state a run resumes from
    metrics.jsonl                the history, written by the driver
    ray/                         Ray Train's own notes while it runs
Checkpoints count from the moment they are renamed into place, whether or not Ray Train has heard of them, so a killed
worker, or a killed driver, costs at most the work since the last one.  Ray Train is told of each by a pointer.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffusion.adapters.ray_elastic import ElasticTrainer
from diffusion.adapters.ray_train_worker import Job, explain, lost_connection, work
from diffusion.data.reading import Reading
from diffusion.recipe import TrainRecipe, digest_of
from diffusion.store.bundle import verify_bundle
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.store.storage import open_storage
from diffusion.training import checkpoint
from diffusion.training.copies import bring_best, bring_newest, settle
from diffusion.training.exact import worlds_of
from diffusion.training.journal import Journal
from diffusion.training.loop import ignore
from diffusion.training.parallel import check_sharding
from diffusion.training.retention import Keep
from diffusion.training.step import NonFiniteLoss, check_sizes, end_of
from diffusion.training.warm_start import check_origin, check_teacher

_POLL_S = 0.5  # of the driver for metrics
_RESTARTS = 3  # of the metrics actor, and of a controller that fails to start its workers


class TrainingFailed(RuntimeError):
    """A run that ended without its last checkpoint; the message is the first worker's that failed."""

    final = True  # it has been tried again, by Ray Train


def train_run(
    recipe: TrainRecipe,
    dataset: DatasetRef,
    run_dir: Path,
    *,
    workers: int | tuple[int, int] = 1,
    use_gpu: bool = False,
    threads: int = 1,
    resize_s: float = 60.0,
    recompute: bool = False,
    shard_weights: bool = False,
    reading: Reading = Reading(),
    keep: Keep = Keep(),
    copies: str | None = None,
    teacher: Path | None = None,
    origin: Path | None = None,
    on_metrics: Callable[[dict[str, float]], None] = ignore,
    on_event: Callable[[dict[str, Any]], None] = ignore,
    max_failures: int = 3,
) -> RunRef:
    """Train to the end of the recipe in the Ray that is running, going on from the newest valid checkpoint in `run_dir`.

    workers: processes, each with `threads` CPU threads and, with use_gpu, one GPU; they divide the batch.  Of (least, most)
    as many as there is room for and as can divide it; with less room than that, training waits.  In the exact mode each has
    one thread: their number shows in the bits, and sites divide their cores among the workers.
    resize_s: how long after a start, and how often from then on, it is looked whether there is room for more.
    recompute: compute the blocks of the U-Net again in the backward pass instead of keeping what they computed.
    shard_weights: divide weights, gradients, optimizer and averages over the workers (FSDP2).
    reading: how workers get at the shards; `reading.copies` is a folder of the node a worker runs on.
    keep: which checkpoints stay.  The best are known from what `ray_validate.Validation` writes to metrics.jsonl.
    copies: folder or s3://bucket/prefix that checkpoints are copied to while the run trains.  Where `run_dir` lacks the
    newest of them, one of the best that are to stay, or one that `keep` names by its moment, it is brought from there.
    teacher, origin: folder of the bundle recipe.lesson.teacher, of a student's run, and of recipe.init, on storage that all
    workers share.
    on_metrics: called in this thread with each new metrics record of `training.loop.train`, all numbers.
    on_event: likewise with {"event": "warm_started" | "started" | "resumed" | "resized" | "damaged_checkpoint" |
    "damaged_sidecar" | "damaged_sample" | "checkpoint" | "checkpoint_failed" | "checkpoint_not_copied" |
    "fetched_checkpoint" | "worker_failed", ...}.
    max_failures: how often a dead or failing worker is replaced.
    Raises ValueError for a batch or weights that cannot be divided, for sizes that the network cannot read, for a model that
    it cannot start or learn from, and for a `run_dir` with another run in it, NonFiniteLoss, StorageUnavailable where the
    copies cannot be reached, and TrainingFailed for all else that ends a run early.
    """
    worlds = worlds_of(recipe, workers)
    check_sizes(recipe, dataset)
    if shard_weights:
        check_sharding(recipe)
    if recipe.init:
        check_origin(recipe, dataset.resolution, verify_bundle(origin, recipe.init)[0])
        origin = Path(origin).resolve()
    if recipe.lesson:
        check_teacher(recipe, dataset.classes, verify_bundle(teacher, recipe.lesson.teacher)[0])
        teacher = Path(teacher).resolve()
    if not ray.is_initialized():
        raise RuntimeError("Ray is not running here: call within `with local_ray(...)`, or after ray.init(address=...)")
    run_dir = Path(run_dir).resolve()  # Ray's workers run in another directory
    dataset = dataset.model_copy(update={"uri": open_storage(dataset.uri).uri})
    threads = threads if recipe.micro_batch is None else 1
    copies = copies and open_storage(copies).uri
    relay = f"train-{uuid.uuid4().hex}"
    job = Job(
        recipe,
        dataset,
        run_dir,
        threads,
        recompute,
        relay,
        reading,
        keep,
        copies,
        teacher,
        origin,
        shard_weights,
    )
    with _only_driver(run_dir):
        journal = Journal(job.history)

        def tell(event: dict[str, Any]) -> None:
            journal.event(event)
            on_event(event)

        if copies:
            bring_newest(job.checkpoints, open_storage(copies), tell)
            if keep.best:
                bring_best(job.checkpoints, job.history, keep.best, open_storage(copies), tell)
        run = _finished(job)
        if run is None:
            trainer = trainer_of(
                job, work, worlds=worlds, use_gpu=use_gpu, resize_s=resize_s, max_failures=max_failures
            )
            non_finite = fit(job, trainer, on_metrics, on_event)
            if non_finite:
                raise NonFiniteLoss(*non_finite)
            run = _finished(job)
        if run and copies:
            settle(job.checkpoints, job.history, open_storage(copies), recipe, keep)
    if run is None:
        raise TrainingFailed(f"{run_dir}: training ended without a valid last checkpoint; start it again to go on")
    return run


@contextmanager
def _only_driver(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder; the lock goes with the process, however it ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is training into {run_dir}: wait for it, or stop it") from None
        yield
    finally:
        os.close(descriptor)


def _finished(job: Job) -> RunRef | None:
    """The reference of the run, if its last checkpoint is there and valid."""
    folder, _ = checkpoint.latest(job.checkpoints)
    if folder is None:
        return None
    saved = checkpoint.read_facts(folder)
    checkpoint.refuse_other_run(folder, saved, job.recipe, job.dataset.digest)
    if saved.images_seen < end_of(job.recipe):
        return None
    return RunRef(
        uri=str(folder),
        digest=digest_of(checkpoint.read_manifest(folder)),  # `latest` has verified it
        recipe_digest=digest_of(job.recipe),
        dataset=job.dataset,
        images_seen=saved.images_seen,
    )


def trainer_of(
    job: Job,
    work: Callable[[dict], Any],
    *,
    worlds: tuple[int, ...],
    use_gpu: bool,
    max_failures: int,
    resize_s: float = 60.0,
    **config: Any,
) -> ray.train.torch.TorchTrainer:
    """A trainer that runs `work({"job": job, **config})` on each worker, of which there are one of `worlds`, ascending."""
    shutil.rmtree(job.notes, ignore_errors=True)
    resources = {"CPU": job.threads} | ({"GPU": 1} if use_gpu else {})
    fixed = len(worlds) == 1
    kind = ray.train.torch.TorchTrainer if fixed else partial(ElasticTrainer, worlds=worlds, run=str(job.run_dir))
    return kind(
        work,
        train_loop_config={"job": job, **config},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=worlds[0] if fixed else (worlds[0], worlds[-1]),
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=resize_s,
        ),
        run_config=ray.train.RunConfig(
            # a name of its own: Ray Train resumes by name, also from what it thinks is complete; we resume by checkpoint
            name=job.relay,
            storage_path=str(job.notes),
            failure_config=ray.train.FailureConfig(max_failures=max_failures, controller_failure_limit=_RESTARTS),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


@ray.remote(num_cpus=0, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
class Relay:
    """Holds records on their way from the workers to the driver."""

    def __init__(self) -> None:
        self._records: list[dict] = []

    def put(self, record: dict) -> None:
        self._records.append(record)

    def drain(self) -> list[dict]:
        records, self._records = self._records, []
        return records


def fit(
    job: Job,
    trainer: ray.train.torch.TorchTrainer,
    on_metrics: Callable[[dict[str, float]], None],
    on_event: Callable[[dict[str, Any]], None],
) -> Any:
    """Run the trainer, handing on the workers' records meanwhile.  Returns what worker 0 returned."""
    journal = Journal(job.history)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # other nodes may die
    relay = Relay.options(name=job.relay, scheduling_strategy=here).remote()
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except BaseException as error:
            outcome.set_exception(error)

    # in a thread Ray Train leaves the signal handlers alone
    Thread(target=run, daemon=True, name="ray-train-fit").start()
    try:
        ended = False
        while not ended:
            wait([outcome], timeout=_POLL_S)
            ended = outcome.done()  # before the drain, so that the last one comes after the end
            for record in ray.get(relay.drain.remote()):
                if "event" in record:
                    for event in (*_resized(journal.world, record), record):
                        journal.event(event)
                        on_event(event)
                elif journal.metrics(record):
                    on_metrics(record)
    finally:
        ray.kill(relay)  # after an interrupt, this is how the workers learn of it: their next record does not arrive
    error = outcome.exception()
    if isinstance(error, ray.train.TrainingFailedError):
        raise TrainingFailed(_first_cause(error)) from None
    if error is not None:
        raise error
    shutil.rmtree(job.notes, ignore_errors=True)
    return outcome.result()


def _resized(world: int | None, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The event of a start on another number of workers than `world`, those of the start before."""
    now = record.get("world", world)
    if world in (None, now):
        return []
    return [{"event": "resized", "from": world, "to": now, "images_seen": record["images_seen"]}]


def _first_cause(error: ray.train.TrainingFailedError) -> str:
    """One line for people: the worker that failed by itself, not those that lost their connection to it."""
    failures = dict(sorted(getattr(error, "worker_failures", {}).items()))
    causes = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}
    for rank, cause in causes.items():
        if not isinstance(cause, RayActorError) and not lost_connection(cause):
            return f"worker {rank}: {explain(cause)}"
    dead = [rank for rank, cause in causes.items() if isinstance(cause, RayActorError)]
    if dead:
        return (
            f"worker {dead[0]} died (killed, or out of memory) more often than max_failures allows. What it finished is in"
            f" the last checkpoint: start training again to go on."
        )
    return str(error).splitlines()[-1]
