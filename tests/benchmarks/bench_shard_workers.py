"""The shard stage on Ray with one worker and with two: `python -m tests.benchmarks.bench_shard_workers`.

256 px JPEGs to 64 px, in turns, so that what else the machine does falls on both alike; the stage alone, Ray is up before.
In the same turns: the same tasks on one and on two processes of a pool without Ray, which is what this machine's two cores
can give; two of them may share a processor with others, and then give less than twice one.  What each way takes of the
processors, Ray's own processes and this one included, says what it would do where nobody else has them: with one worker
this process and Ray's have the other processor for themselves, with two they take from the workers what they need.  So
the bound is the time with one worker over half of what two take of the processors, and no order of work is faster; it says
something where two had nearly two processors.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np

from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_data import ray_each
from diffusion.data.images import encode_jpeg
from diffusion.data.ingest import shard_dataset
from diffusion.recipe import ShardRecipe

LIMIT = 1.7  # times as fast with two workers
RECIPE = ShardRecipe(resolution=64)
SIDE = 256


def make_source(folder: Path, count: int) -> Path:
    """Smooth pictures with some noise, as photographs compress: about 30 kB each."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class-{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = random.integers(0, 224, (SIDE // 16, SIDE // 16, 3)).repeat(16, 0).repeat(16, 1)
        path.write_bytes(encode_jpeg((smooth + random.integers(0, 32, (SIDE, SIDE, 3))).astype(np.uint8), 85))
    return folder


def pool_each(pool: Pool, function: Callable[[dict], dict], tasks: Iterable[dict]) -> Iterator[dict]:
    return pool.imap_unordered(function, list(tasks))  # the catalogue is this thread's


def used() -> float:
    """Seconds of processor that this process and all that descend from it have had."""
    above, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = file.read_text().rpartition(")")[2].split()
            above[file.parent.name], ticks[file.parent.name] = fields[1], sum(map(int, fields[11:15]))
    ours = {str(os.getpid())}
    while more := {process for process in above if above[process] in ours} - ours:
        ours |= more
    return sum(ticks[process] for process in ours) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="b-", dir="/tmp"))
        pools = [stack.enter_context(multiprocessing.get_context("spawn").Pool(n)) for n in (1, 2)]
        stack.enter_context(local_ray(Path(name, "ray"), cpus=2))
        ways = {
            "pool of 1": partial(pool_each, pools[0]),
            "pool of 2": partial(pool_each, pools[1]),
            "Ray, 1 worker": partial(ray_each, workers=1),
            "Ray, 2 workers": partial(ray_each, workers=2),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        spent: dict[str, list[float]] = {way: [] for way in ways}
        source, root = make_source(Path(name, "pictures"), given.pictures), Path(name, "root")
        few = make_source(Path(name, "few"), min(given.pictures, 512))
        for turn in range(given.turns + 1):  # the first is to warm up
            for way, each in ways.items():
                start, before = time.perf_counter(), used()
                shard_dataset(source if turn else few, RECIPE, root, each=each)
                if turn:
                    seconds[way].append(time.perf_counter() - start)
                    spent[way].append(used() - before)
                shutil.rmtree(root)
    for way, turns in seconds.items():
        each = 1e6 * statistics.median(spent[way]) / given.pictures
        rate = statistics.median(given.pictures / s for s in turns)
        print(f"{way:<15} {rate:>8,.0f} pictures/s {each:>8,.0f} us of processor each")
    for one, two in (("pool of 1", "pool of 2"), ("Ray, 1 worker", "Ray, 2 workers")):
        ratios = sorted(a / b for a, b in zip(seconds[one], seconds[two], strict=True))
        median = statistics.median(ratios)
        bound = statistics.median(2 * a / cpu for a, cpu in zip(seconds[one], spent[two], strict=True))
        given = statistics.median(cpu / b for b, cpu in zip(seconds[two], spent[two], strict=True))
        print(
            f"{two} / {one}: {median:.2f} (of {', '.join(f'{r:.2f}' for r in ratios)}); two processors without a pause:"
            f" {bound:.2f}; had {given:.2f} of them"
        )
    print(f"limit {LIMIT}: {'passed' if median >= LIMIT else 'FAILED'}")
    raise SystemExit(median < LIMIT)


if __name__ == "__main__":
    main()
