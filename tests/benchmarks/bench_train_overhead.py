"""What the full training path costs over the bare step: `python -m tests.benchmarks.bench_train_overhead`.

Both run in the same Ray Train workers, in turns (bare, full; full, bare; ...), on the same network and the same data:

bare  `train_step` on a batch already in memory, without averages: forward, backward, all-reduce, clip, AdamW
full  `training.loop.train` as a run has it: reader with read-ahead, averages, metrics to the driver's metrics.jsonl
      and checkpoints that are hashed, flushed to disk, published and reported to Ray Train

Each full turn ends with a checkpoint; its time is counted in the proportion a run has them (one per
`checkpoint_images`), and whole, as though no step went on beside it: `bench_checkpoint` has what stops the step.  The
first turns, which fill the reader's cache, do not count.
"""

import argparse
import statistics
import tempfile
import time
import uuid
from itertools import chain
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch

from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_train import fit, trainer_of
from diffusion.adapters.ray_train_saver import Saver
from diffusion.adapters.ray_train_worker import Job, reader_of, sender, share_of
from diffusion.data.ingest import shard_dataset
from diffusion.data.reading import Reading
from diffusion.ema import PowerEMA
from diffusion.presets import PRESETS
from diffusion.training import checkpoint
from diffusion.training.figures import Figures, peak_of
from diffusion.training.loop import ignore, metrics_images_of, train
from diffusion.training.parallel import data_parallel, world_gather
from diffusion.training.retention import Keep
from diffusion.training.step import TrainState, build_state, train_step

LIMIT = 0.97  # of the bare step's images/s


def measure(config: dict) -> list[tuple[float, ...]]:
    """Runs on each worker.  Returns (bare, full without checkpoint, checkpoint) seconds of each turn, and the CPU seconds
    of this process in bare and full."""
    job, turns, steps = config["job"], config["turns"], config["steps"]
    recipe = job.recipe
    torch.set_num_threads(job.threads)
    device = ray.train.torch.get_device()
    context, gather = ray.train.get_context(), world_gather()
    rank, world = context.get_world_rank(), context.get_world_size()
    tell = sender(ray.get_actor(job.relay)) if rank == 0 else ignore
    state = build_state(recipe, resolution=job.dataset.resolution, classes=len(job.dataset.classes), device=device)
    model = data_parallel(state, job.dataset.resolution)
    reader = reader_of(job)
    in_memory = next(share_of(job, recipe, 0, reader))
    facts = checkpoint.facts_of(recipe, job.dataset, world=world, device=device)
    figures = Figures(
        recipe, job.dataset.resolution, peak=peak_of(recipe, device, gather), device=device, gather=gather
    )
    checkpoint_s = 0.0

    def timed_save(state: TrainState) -> None:
        nonlocal checkpoint_s
        started = now(gather)
        with Saver(job.checkpoints, job.notes, facts, tell, keep=job.keep, copies=job.copies) as saver:
            saver(state)
        checkpoint_s = now(gather) - started

    def bare() -> float:
        plain = TrainState(state.net, PowerEMA(state.net, ()), state.optimizer, state.images_seen)
        started = now(gather)
        for _ in range(steps):
            train_step(plain, in_memory, recipe, model=model)
        return now(gather) - started

    def full() -> float:
        end = state.images_seen + steps * recipe.batch_size
        turn = recipe.model_copy(update={"images": end, "checkpoint_images": end})
        share = figures.counted(share_of(job, turn, state.images_seen, reader))
        share = chain([next(share)], share)  # a run opens its reader once, not every turn
        started = now(gather)
        train(
            state,
            share,
            turn,
            model=model,
            on_metrics=figures.telling(tell),
            on_checkpoint=timed_save,
            gather=gather,
            metrics_images=config["metrics_images"],
        )
        return now(gather) - started - checkpoint_s

    rows = []
    for turn in range(turns + 1):
        wall, cpu = {}, {}
        for part in (full, bare) if turn % 2 else (bare, full):
            used = time.process_time()
            wall[part] = part()
            cpu[part] = time.process_time() - used
        rows.append((wall[bare], wall[full], checkpoint_s, cpu[bare], cpu[full]))
    return rows[1:]


def now(gather) -> float:
    """The time when every worker and its device have come here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    gather(None)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--turns", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps in each half of a turn")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    recipe = PRESETS[options.preset]()
    train_recipe = recipe.train
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, local_ray(Path(folder, "ray"), cpus=4):
        dataset = shard_dataset("embedded", recipe.shard, folder)
        job = Job(
            train_recipe,
            dataset,
            Path(folder, "run"),
            options.threads,
            False,
            f"bench-{uuid.uuid4().hex}",
            Reading(),
            Keep(),
            copies=None,
        )
        trainer = trainer_of(
            job,
            measure,
            worlds=(options.workers,),
            use_gpu=options.gpu,
            max_failures=0,
            turns=options.turns,
            steps=options.steps,
            metrics_images=metrics_images_of(train_recipe),  # as often as in a whole run
        )
        rows = fit(job, trainer, ignore, ignore)
    images = options.steps * train_recipe.batch_size
    share = images / train_recipe.checkpoint_images
    ratios = []
    for bare_s, full_s, checkpoint_s, *_ in rows:
        full_s += checkpoint_s * share
        ratios.append(bare_s / full_s)
        print(f"bare {images / bare_s:8.1f} images/s   full {images / full_s:8.1f} images/s   ratio {ratios[-1]:.3f}")
    bare_s, loop_s, checkpoint_s, bare_cpu_s, full_cpu_s = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    ratio = statistics.median(ratios)
    print(
        f"\n{options.preset}, {options.workers} workers x {options.threads} threads, batch {train_recipe.batch_size},"
        f" medians: bare {images / bare_s:.1f} images/s, full {images / (loop_s + checkpoint_s * share):.1f} images/s"
        f" (a checkpoint takes {checkpoint_s:.2f} s, one per {train_recipe.checkpoint_images} images)\n"
        f"ratio {ratio:.3f}, median of {len(ratios)} turns (from {min(ratios):.3f} to {max(ratios):.3f}); limit {LIMIT}:"
        f" {'passed' if ratio >= LIMIT else 'FAILED'}\n"
        f"CPU time of worker 0, which other processes disturb less: ratio {bare_cpu_s / full_cpu_s:.3f}, with the start of"
        f" the reader and the whole checkpoint"
    )
    raise SystemExit(ratio < LIMIT)


if __name__ == "__main__":
    from tests.benchmarks import bench_train_overhead  # under this name the workers can import `measure`

    bench_train_overhead.main()
