"""Memory and time of the shard stage from 1,000 to 200,000 pictures: `python -m tests.benchmarks.bench_shard_memory`.

The source is a zip of small, distinct PNGs.  Each row is a process of its own: its peak of resident memory, beside what the
program takes before it begins, seconds and microseconds a picture; and the same for the next version, with one picture in a
hundred added.  Limits: the peak of every row; and of first versions of 10,000 pictures and more, whose cost is no longer
that of beginning and ending, the dearest CPU time of a picture against the cheapest.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from diffusion.data.images import encode_png
from diffusion.data.ingest import shard_dataset
from diffusion.recipe import ShardRecipe

RECIPE = ShardRecipe(resolution=32)
COUNTS = (1_000, 10_000, 50_000, 200_000)
LIMIT_MIB, LIMIT_RISE, MANY = 160, 1.2, 10_000


def make_source(path: Path, first: int, last: int) -> None:
    """Append pictures [first, last) to a zip: 8 x 8 blocks of random colours, each its own."""
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(first, last):
            blocks = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            archive.writestr(f"class-{i % 10}/{i:07d}.png", encode_png(blocks.repeat(4, 0).repeat(4, 1)))


def measure(source: Path, root: Path) -> dict[str, float]:
    """Shard in this process."""
    at_first, before = peak_mib(), resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    ref = shard_dataset(source, RECIPE, root)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pictures": ref.images + ref.holdout,
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "mib_before": at_first,
        "mib": peak_mib(),
    }


def peak_mib() -> float:
    """Most resident memory that this program has had; rusage's figure begins with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def in_a_process(source: Path, root: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--measure", str(source), str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--measure", type=Path, nargs=2)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(*given.measure)))
        return
    print(
        f"{'pictures':>9} {'version':>8} {'seconds':>8} {'us a picture':>13} {'CPU us':>7} {'peak MiB':>9} {'before':>7}"
    )
    peak, costs = 0.0, []
    for count in given.counts:
        with tempfile.TemporaryDirectory() as folder:
            source, root = Path(folder, "pictures.zip"), Path(folder, "root")
            for version, span in (("first", (0, count)), ("next", (count, count + max(1, count // 100)))):
                make_source(source, *span)
                row = in_a_process(source, root)
                each = 1e6 / row["pictures"]
                print(
                    f"{row['pictures']:>9,} {version:>8} {row['seconds']:>8.1f} {row['seconds'] * each:>13.0f}"
                    f" {row['cpu'] * each:>7.0f} {row['mib']:>9.0f} {row['mib_before']:>7.0f}",
                    flush=True,
                )
                peak = max(peak, row["mib"])
                if version == "first" and count >= MANY:
                    costs.append(row["cpu"] * each)
    rise = max(costs) / min(costs) if costs else 1.0
    passed = peak <= LIMIT_MIB and rise <= LIMIT_RISE
    print(
        f"largest peak {peak:.0f} MiB (limit {LIMIT_MIB}), dearest picture {rise:.2f} x the cheapest (limit {LIMIT_RISE}):"
        f" {'passed' if passed else 'FAILED'}"
    )
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
