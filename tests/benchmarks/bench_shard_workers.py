"""The shard stage on Ray with one worker and with two: `python -m tests.benchmarks.bench_shard_workers`.

256 px JPEGs to 64 px, in turns, so that what else the machine does falls on both alike; the stage alone, Ray is up before.
In the same turns: this process without Ray, which has nothing to start and nothing to hand over.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from diffusion.adapters.ray_cluster import local_ray
from diffusion.adapters.ray_data import ray_each
from diffusion.data.images import encode_jpeg
from diffusion.data.ingest import shard_dataset
from diffusion.recipe import ShardRecipe

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    ways = {
        "no Ray": map,
        "Ray, 1 worker": partial(ray_each, workers=1),
        "Ray, 2 workers": partial(ray_each, workers=2),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name, local_ray(Path(name, "ray"), cpus=2):
        source, root = make_source(Path(name, "pictures"), given.pictures), Path(name, "root")
        list(ray_each(dict, [{}] * 4))  # workers start
        for turn in range(given.turns + 1):
            for way, each in ways.items():
                start = time.perf_counter()
                shard_dataset(source, RECIPE, root, each=each)
                if turn:  # the first is to warm up
                    seconds[way].append(time.perf_counter() - start)
                shutil.rmtree(root)
    for way, turns in seconds.items():
        print(f"{way:<15} {statistics.median(given.pictures / s for s in turns):>8,.0f} pictures/s")
    ratios = [one / two for one, two in zip(seconds["Ray, 1 worker"], seconds["Ray, 2 workers"], strict=True)]
    print(f"2 workers / 1: {statistics.median(ratios):.2f} (of {', '.join(f'{r:.2f}' for r in sorted(ratios))})")


if __name__ == "__main__":
    main()
