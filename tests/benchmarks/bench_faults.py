"""Hundreds of things that go wrong between a bucket of pictures and batches: `python -m tests.benchmarks.bench_faults`.

The bucket is one of a real S3 server, behind a proxy that spoils a share of the answers in every way it knows
(`tests/faulty_proxy.py`).  In turn:

upload      the pictures go into the bucket
shard       a process that shards them into another bucket is killed with SIGKILL at random moments and started again
Ray         the same on Ray, whose workers are killed in the middle of a task
full disk   the same into a folder on a disk that is full again and again, and is given a little room each time
read        ranks, each a process, read more than two epochs through one cache with room for a quarter of the shards; all are
            killed at random moments, copies in the cache are damaged, and another number of ranks goes on
full cache  the same by one rank, whose cache is on a disk that is full again and again
at rest     files of the dataset in the bucket are changed, cut and removed; lint must name these and no others, and doing
            what a reader says makes the dataset whole

Each must come to the digest, or the batches (keys, pixels, labels, captions), of a run on the disk that nobody disturbed,
and an epoch must have each picture once.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

from diffusion.adapters.ray_cluster import local_ray
from diffusion.data import datasets, ingest, manifest
from diffusion.data.lint import lint
from diffusion.data.reader import ShardReader
from diffusion.store.retry import retries
from diffusion.store.storage import open_storage
from tests.faults import (
    BATCH,
    KINDS,
    QUICK,
    RECIPE,
    Network,
    damage_at_rest,
    on_small_disk,
    pictures,
    read,
    read_with_kills,
    repaired,
    shard_on_ray,
    shard_with_kills,
    through,
    uploaded,
)
from tests.faulty_proxy import FLIPPED
from tests.s3_server import S3Server, s3_server


class Table:
    """Prints a line for each kind of fault, and what came of it."""

    def __init__(self) -> None:
        self.injected: Counter[str] = Counter()
        self.right = True
        self._began = time.monotonic()

    def add(self, phase: str, faults: dict[str, int], retried: Counter, outcome: str, right: bool) -> None:
        for kind, number in sorted(faults.items()):
            print(f"{phase:<11}{kind:<28}{number:>6}")
        self.injected.update(faults)
        self.right &= right
        asked = f"asked again {retried.total()} times; " if retried else ""
        print(f"{phase:<11}{asked}{outcome if right else 'NOT: ' + outcome} ({time.monotonic() - self._began:.0f} s)\n")


def run(s3: S3Server, folder: Path, count: int, seed: int) -> bool:
    """All of it; whether every outcome is as it should be."""
    files = pictures(folder / "pictures", count)
    plain = ingest.shard_dataset(files, RECIPE, folder / "plain")
    reader, table = ShardReader(plain.uri), Table()
    stop = -(-int(2.2 * len(reader)) // BATCH) * BATCH
    wanted = list(read(reader, 0, stop))
    print(
        f"{count} files, {len(reader)} pictures in {len(reader.entries)} shards to train on, {stop // BATCH} batches\n"
    )
    source, root, on_ray = (f"{s3.bucket()}/{name}" for name in ("pictures", "data", "ray"))

    def same(uri: str) -> bool:
        return manifest.load(uri).digest == plain.digest and lint(datasets.opened(uri)) == []

    with Network(s3.url, seed=seed) as network, through(network):
        before = retries()
        uploaded(files, open_storage(source))
    there = {found.name: found.size for found in open_storage(source).walk()}
    sizes = {str(path.relative_to(files)): path.stat().st_size for path in files.rglob("*.*")}
    table.add("upload", network.injected, retries() - before, "every file is there", there == sizes)

    with Network(s3.url, seed=seed) as network, through(network) as environment:
        uri, kills, retried = shard_with_kills(environment, source, root, folder / "shard", seed)
    table.add("shard", network.injected | {"process killed": kills}, retried, "same digest", same(uri))

    network = Network(s3.url, seed=seed, rate=0.2, kinds=QUICK)
    with network, through(network), local_ray(folder / "ray", cpus=4):
        other, kills = shard_on_ray(source, on_ray, folder / "on-ray")
    table.add("Ray", network.injected | {"worker killed": kills}, Counter(), "same digest", same(other))

    full, kept = 0, []
    for name, work, step in (("all", "", 2**17), ("root", folder / "roomy", 2**14)):
        said, _ = on_small_disk("shard_on_small_disk", files, folder / name, folder / "kept" / name, work, step)
        full += len(said)
        kept.append(same(f"{folder}/kept/{name}/{manifest.place_of(plain.digest)}"))
    table.add("full disk", {"disk full": full}, Counter(), "same digest", all(kept))

    with Network(s3.url, seed=seed, kinds=(*KINDS, *[FLIPPED] * 8)) as network, through(network) as environment:
        reading = read_with_kills(environment, uri, reader, stop, folder / "read", seed)
    faults = network.injected | {"process killed": reading.kills, "copy damaged": reading.spoilt}
    keys = [key for batch in reading.seen for key, _ in batch]
    epochs = [sorted(keys[i * len(reader) :][: len(reader)]) for i in range(2)]
    exact = reading.seen == wanted and epochs == [sorted(reader.keys)] * 2
    table.add("read", faults, reading.retried, "same batches, each picture once an epoch", exact)

    with Network(s3.url, seed=seed) as network, through(network):
        said, seen = on_small_disk("read_on_small_disk", uri, folder / "tiny", stop)
    table.add("full cache", network.injected | {"disk full": len(said)}, Counter(), "same batches", seen == wanted)

    harm = damage_at_rest(uri, seed)
    named = {finding.place for finding in lint(datasets.opened(uri))}
    repair = repaired(uri, source, folder / "repair")
    right = named == set(harm) and repair == uri and same(uri)
    table.add("at rest", {"file of the dataset damaged": len(harm)}, Counter(), "all found, made whole again", right)

    print(f"{table.injected.total()} faults; {'nothing lost or repeated' if table.right else 'WRONG, see above'}")
    for kind, number in table.injected.most_common():
        print(f"  {kind:<28}{number:>6}")
    return table.right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with (
        s3_server() as s3,
        tempfile.TemporaryDirectory(prefix="bench-faults-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in s3.environment.items():
            patch.setenv(key, value)
        raise SystemExit(not run(s3, Path(folder), options.pictures, options.seed))


if __name__ == "__main__":
    main()
