"""The price of the exact mode: `python -m tests.benchmarks.bench_exact`.

Whole steps of the demo's network on a batch in memory, without it (one pass over a process's share; with two processes
DistributedDataParallel) and with it at several sizes of a micro-batch, in turns, by one process and by two over gloo.
The ratio is that of images/s, exact to plain, turn by turn; its median must be at least the limit at the size of a
micro-batch that a worker's share is cut into two by.  Beside it the same ratio by processor time of rank 0, which other work
on the machine disturbs less, but which leaves out what a worker waits for.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from diffusion.training.exact import workers_of
from diffusion.training.parallel import data_parallel, exact_parallel
from diffusion.training.step import Part, build_state, parts_of, train_step
from tests.random_batch import random_batch

LIMIT = 0.85


def measure(rank: int, world: int, options: argparse.Namespace, rendezvous: str) -> None:
    """One of `world` processes: prints, on rank 0, what each mode makes of the same batch."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    recipe = PRESETS[options.preset]()
    batch = recipe.train.batch_size
    whole = random_batch(0, batch, side=recipe.shard.resolution, classes=9)
    share = list(parts_of(whole, batch // world))[rank]
    sizes = [size for size in options.sizes if size <= batch // world]
    modes = {"plain": stepper(recipe, None, share)} | {f"exact {size}": stepper(recipe, size, share) for size in sizes}
    wall: dict[str, list[float]] = {name: [] for name in modes}  # images/s of each turn
    cpu: dict[str, list[float]] = {name: [] for name in modes}
    images = options.steps * batch
    for turn in range(options.turns + 1):
        for name in list(modes) if turn % 2 else reversed(modes):
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            for _ in range(options.steps):
                modes[name]()
            used = time.process_time() - used
            dist.barrier()
            if turn:  # the first warms up
                wall[name].append(images / (time.perf_counter() - started))
                cpu[name].append(images / used)
    for name in modes if rank == 0 else ():
        ratios, by_cpu = (ratios_of(rates[name], rates["plain"]) for rates in (wall, cpu))
        ratio = statistics.median(ratios)
        judged = name == f"exact {batch // world // 2}"
        verdict = f"  limit {LIMIT}: {'met' if ratio >= LIMIT else 'MISSED'}" if judged else ""
        processes = f"{world} process{'es' if world > 1 else '  '}"
        print(
            f"{processes}  {name:9s} {statistics.median(wall[name]):7.1f} images/s   ratio {ratio:.3f}"
            f" (turns {ratios[0]:.2f} to {ratios[-1]:.2f}), by processor time {statistics.median(by_cpu):.3f}"
            f" ({by_cpu[0]:.2f} to {by_cpu[-1]:.2f}){verdict}",
            flush=True,
        )
    dist.destroy_process_group()


def ratios_of(rates: list[float], plain: list[float]) -> list[float]:
    """Of each turn, ascending."""
    return sorted(rate / of_plain for rate, of_plain in zip(rates, plain, strict=True))


def stepper(recipe: Recipe, micro_batch: int | None, share: Part) -> Callable[[], None]:
    """A training step on a state of its own."""
    train = recipe.train.model_copy(update={"micro_batch": micro_batch})
    resolution = recipe.shard.resolution
    state = build_state(train, resolution=resolution, classes=9, device="cpu")
    if micro_batch is None:
        model = data_parallel(state, resolution)
        return lambda: train_step(state, share, train, model=model)
    assert dist.get_world_size() in workers_of(train)
    add_up = exact_parallel(state, train)
    return lambda: train_step(state, share, train, add_up=add_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of a mode in each turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="of a micro-batch")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    train = PRESETS[options.preset]().train
    print(f"batch {train.batch_size}, {options.threads} thread(s) a process, torch {torch.__version__}")
    for world in options.worlds:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            mp.spawn(measure, (world, options, f"{folder}/rendezvous"), nprocs=world)


if __name__ == "__main__":
    main()
