"""What each Ray Train worker does: resume or start, train, save.  The driver's side is `adapters.ray_train`."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from diffusion.adapters.ray_train_saver import Saver
from diffusion.codec import Codec
from diffusion.data.damage import Damage
from diffusion.data.precomputed import DamagedSidecar
from diffusion.data.reader import ShardReader
from diffusion.data.reading import Reading
from diffusion.data.reading_order import order_of
from diffusion.data.sidecar import Sidecars
from diffusion.data.stream import Batch, batches
from diffusion.recipe import TrainRecipe
from diffusion.store.bundle import load_model
from diffusion.store.codecs import codec_named
from diffusion.store.refs import DatasetRef
from diffusion.store.text_encoders import REMEMBERED
from diffusion.text import looking_up, remembering
from diffusion.training import checkpoint
from diffusion.training.device import sent_ahead
from diffusion.training.figures import Figures, peak_of
from diffusion.training.loop import ignore, train
from diffusion.training.parallel import data_parallel, exact_parallel, shard, world_gather
from diffusion.training.retention import Keep
from diffusion.training.step import NonFiniteLoss, TrainState, build_state, end_of
from diffusion.training.warm_start import warm_start

Send = Callable[[dict[str, Any]], None]  # takes a record to the driver


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    recipe: TrainRecipe
    dataset: DatasetRef
    run_dir: Path
    threads: int
    recompute: bool
    relay: str  # name of the actor that takes records to the driver
    reading: Reading
    keep: Keep
    copies: str | None  # where checkpoints are copied to
    teacher: Path | None = None  # bundle of recipe.lesson's
    origin: Path | None = None  # folder of the bundle recipe.init
    shard_weights: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def history(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def notes(self) -> Path:
        return self.run_dir / "ray"


def work(config: dict[str, Job]) -> tuple | None:
    """Train to the end.  Returns the arguments of a NonFiniteLoss, which no retry can cure, or None."""
    job = config["job"]
    try:
        relay = ray.get_actor(job.relay)
    except ValueError:  # the driver has left, and this worker replaces one that found out
        return None
    try:
        run_worker(job, sender(relay))
    except NonFiniteLoss as error:  # on every rank at once
        return error.images_seen, error.grad_norm, error.samples
    except Exception as error:
        rank = ray.train.get_context().get_world_rank()
        relay.put.remote({"event": "worker_failed", "rank": rank, "error": explain(error)})
        raise
    return None


def run_worker(job: Job, send: Send) -> None:
    """Resume or start, and train to the end, as one of the processes that torch.distributed joins."""
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    tell = send if rank == 0 else ignore
    torch.set_num_threads(job.threads)
    device = ray.train.torch.get_device()
    gather, lesson = world_gather(), job.recipe.lesson
    state = build_state(
        job.recipe,
        resolution=job.dataset.resolution,
        classes=len(job.dataset.classes),
        device=device,
        teacher=load_model(job.teacher, digest=lesson.teacher)[1].to(device) if lesson else None,
    )
    state.net.net.recompute = job.recompute
    pids = gather(os.getpid())
    folder, damaged = gather(checkpoint.latest(job.checkpoints) if rank == 0 else None)[0]
    carried = None
    if folder is None and job.recipe.init:
        carried = warm_start(state, job.dataset.classes, *load_model(job.origin, digest=job.recipe.init))
    if job.shard_weights:
        shard(state, job.recipe)
    facts = checkpoint.facts_of(
        job.recipe,
        job.dataset,
        world=world,
        device=device,
        text=state.text,
        codec=state.codec,
        sharded=state.shards is not None,
    )
    changed = checkpoint.load(folder, state, facts) if folder else {}
    for reason in damaged:
        tell({"event": "damaged_checkpoint", "reason": reason, "instead": str(folder) if folder else None})
    if carried:
        tell({"event": "warm_started", "model": job.recipe.init, **carried._asdict()})
    name = "resumed" if folder else "started"
    tell({"event": name, "images_seen": state.images_seen, "world": world, "pids": pids, "changed": changed})
    reader = reader_of(job, codec_named(state.codec, str(device)) if state.codec else None)
    sidecars = find_captions(state, reader, tell)
    exact = job.recipe.micro_batch is not None
    # some of its faster kernels add in the order in which threads happen to run
    torch.backends.cudnn.deterministic = exact
    peak = peak_of(job.recipe, device, gather)
    figures = Figures(job.recipe, job.dataset.resolution, peak=peak, device=device, gather=gather)
    share = share_of(job, job.recipe, state.images_seen, reader, sidecars, send=send)
    with Saver(job.checkpoints, job.notes, facts, tell, keep=job.keep, copies=job.copies) as saver:
        train(
            state,
            figures.counted(saver.beside(sent_ahead(share, device))),
            job.recipe,
            model=None
            if exact or state.shards
            else data_parallel(state, job.dataset.resolution // job.recipe.codec_factor),
            add_up=exact_parallel(state, job.recipe) if exact else None,
            on_metrics=figures.telling(tell),
            on_checkpoint=saver,
            gather=gather,
        )


def reader_of(job: Job, codec: Codec | None = None) -> ShardReader:
    return ShardReader(
        job.dataset.uri,
        "train",
        digest=job.dataset.digest,
        captions=job.recipe.text_encoder != "none",
        shards=job.reading.cache,
        max_damaged=job.reading.max_damaged,
        codec=codec,
    )


def find_captions(state: TrainState, reader: ShardReader, tell: Send) -> Sidecars | None:
    """Have the state's encoder, if it has one, compute only what no sidecar of the dataset has: the numbers are the same."""
    if state.encoder is None:
        return None
    shards = [entry.sha256 for entry in reader.entries]
    sidecars = Sidecars(
        reader.root, shards, state.encoder, lambda error: tell({"event": "damaged_sidecar", "reason": str(error)})
    )
    state.encoder = remembering(looking_up(state.encoder, sidecars.find), REMEMBERED)
    return sidecars


def share_of(
    job: Job,
    recipe: TrainRecipe,
    start: int,
    reader: ShardReader,
    sidecars: Sidecars | None = None,
    send: Send = ignore,
) -> Iterator[Batch]:
    """This worker's share of the batches from position `start` to the end of `recipe`; `sidecars` turn to its shards.
    Every worker tells of the damage that it meets in its share, and counts it against its own limit."""
    order = order_of(reader.manifest, "train", recipe)
    context = ray.train.get_context()

    def tell_of(damage: Damage | DamagedSidecar) -> None:
        if isinstance(damage, DamagedSidecar):
            send({"event": "damaged_sidecar", "reason": str(damage)})
        else:
            send({"event": "damaged_sample", "rank": context.get_world_rank(), **damage._asdict()})

    share = batches(
        reader,
        order,
        recipe.batch_size,
        start=start,
        stop=end_of(recipe),
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        seed=recipe.seed,
        threads=1,
        ahead_mib=job.reading.ahead_mib,
        on_damage=tell_of,
    )
    return sidecars.beside(share, order, reader.shards_of) if sidecars else share


def sender(relay: Any) -> Send:
    """Send without waiting, from any thread; but if the record before did not arrive, nobody listens any more: fail."""
    sent: list[ray.ObjectRef] = []
    one_at_a_time = threading.Lock()

    def send(record: dict[str, Any]) -> None:
        with one_at_a_time:
            if sent:
                ray.get(sent.pop())
            sent.append(relay.put.remote(record))

    return send


def lost_connection(error: BaseException) -> bool:
    """Whether a worker failed only because another one did."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))


def explain(error: BaseException) -> str:
    """One line for people."""
    return "lost the connection to another worker" if lost_connection(error) else f"{type(error).__name__}: {error}"
