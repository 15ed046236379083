"""How long a checkpoint stops the step: `python -m tests.benchmarks.bench_checkpoint`.

In one process, on all cores, so that what is written beside the steps takes its time from them.  In each turn every way
takes `--steps` steps, a checkpoint, and `--steps` steps more, in an order that rotates:

beside      `training.saving`: the state is copied; a thread hashes, flushes to the disk and publishes
waiting     `checkpoint.save`: the same while the step waits
torch.save  one file, neither hashed nor flushed
DCP         `torch.distributed.checkpoint.async_save`: copies the state, a thread writes; neither hashed nor flushed

`stopped` is how long the call took; `in all` what the turn took longer than its steps alone.  Both as shares of the time in
which the preset sees the images between two checkpoints, at the speed of the steps before.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import async_save

from diffusion.presets import PRESETS
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.saving import Saving
from diffusion.training.step import TrainState, build_state, train_step
from tests.random_batch import random_batch

LIMIT = 0.01  # of the time

Wait = Callable[[], object]  # until a checkpoint is written
Way = Callable[[TrainState, Path], Wait]


def ways_of(facts: checkpoint.Facts, folder: Path, saving: Saving) -> dict[str, Way]:
    def beside(state: TrainState, target: Path) -> Wait:
        saving.begin(state)
        return saving.wait

    def waiting(state: TrainState, target: Path) -> Wait:
        checkpoint.save(state, target, facts)
        return lambda: None

    def torch_save(state: TrainState, target: Path) -> Wait:
        torch.save(checkpoint.snapshot_of(state).files, target)
        return lambda: None

    def dcp(state: TrainState, target: Path) -> Wait:
        return async_save(checkpoint.snapshot_of(state).files, checkpoint_id=target).result

    return {"beside": beside, "waiting": waiting, "torch.save": torch_save, "DCP": dcp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    recipe = PRESETS[options.preset]()
    train, side = recipe.train, recipe.shard.resolution
    torch.set_num_threads(os.cpu_count() or 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dataset = DatasetRef(
        uri="/none", digest="d" * 64, resolution=side, classes=("a", "b"), images=1, holdout=0, rejected=0
    )
    state = build_state(train, resolution=side, classes=2, device="cpu")
    facts = checkpoint.facts_of(train, dataset, world=1, device=torch.device("cpu"))

    def steps() -> float:
        started = time.perf_counter()
        for _ in range(options.steps):
            train_step(state, random_batch(state.images_seen, train.batch_size, side=side, classes=2), train)
        return time.perf_counter() - started

    rows: dict[str, list[tuple[float, float]]] = {}
    alone = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with Saving(Path(folder, "beside"), facts) as saving:
            ways = ways_of(facts, Path(folder), saving)
            steps()
            for turn in range(options.turns + 1):  # the first does not count: memory is taken there
                order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
                for name in order:
                    before = steps()
                    started = time.perf_counter()
                    wait = ways[name](state, Path(folder, f"{name}-{turn}"))
                    stopped = time.perf_counter() - started
                    steps()
                    wait()
                    whole = time.perf_counter() - started
                    if turn:
                        rows.setdefault(name, []).append((stopped, whole - before))
                        alone.append(before)
        size = sum(path.stat().st_size for path in Path(folder, "waiting-1").iterdir())
    dist.destroy_process_group()
    rate = options.steps * train.batch_size / statistics.median(alone)
    between_s = train.checkpoint_images / rate
    print(
        f"{options.preset}: {size / 2**20:.0f} MiB a checkpoint, {rate:.1f} images/s alone, a checkpoint every"
        f" {train.checkpoint_images:,} images = {between_s:.1f} s; medians of {options.turns} turns"
    )
    shares = {}
    for name, turns in rows.items():
        stopped, extra = (statistics.median(column) for column in zip(*turns, strict=True))
        longest = max(stop for stop, _ in turns)
        shares[name] = stopped / between_s
        print(
            f"{name:<11} stopped {stopped * 1e3:7.1f} ms ({shares[name]:.3%}, longest {longest * 1e3:.1f} ms)"
            f"   in all {extra * 1e3:7.1f} ms ({extra / between_s:.2%})"
        )
    print(f"limit {LIMIT:.0%}: {'passed' if shares['beside'] < LIMIT else 'FAILED'}")
    raise SystemExit(shares["beside"] >= LIMIT)


if __name__ == "__main__":
    main()
