"""A line at 1e6, 1e8 and 1e10 pictures on 8 to 512 GPUs, simulated: `python -m tests.benchmarks.bench_scale`.

measured: memory and first answers of `data.order`, memory and time of reading a manifest.
simulated: which shards each machine and worker asks for, by the real `Order`, `OpenShards` and `ShardCache`, over a storage
that counts instead of sending.
formula: requests and their price (`planning.requests`), FLOPs, the exchange of gradients, checkpoints, failures
(`planning.cluster`).  docs/scale.md explains the tables and says what breaks first.  About two minutes.
"""

import argparse
import hashlib
import io
import os
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.data import manifest
from diffusion.data.manifest import Manifest, Processing, ShardEntry
from diffusion.data.open_shards import INDEX_BYTES, OPEN_SHARDS, OpenShards
from diffusion.data.order import Order
from diffusion.data.shards import INDEX
from diffusion.planning import cluster, requests
from diffusion.planning.devices import device_named
from diffusion.planning.foretell import statistics_s
from diffusion.planning.work import INDEX_HEADER, training_cost
from diffusion.presets import PRESETS
from diffusion.store.cache import ShardCache
from diffusion.training.plan import plan_of

PICTURES = (10**6, 10**8, 10**10)
GPUS = (8, 32, 128, 512)
PER_MACHINE = 8
STORED = 12_000  # bytes of a 64 px photograph in a shard
GET, PUT = 0.0004, 0.005  # price of a thousand requests, as S3 asks in 2026 for its standard class, in dollars
NETWORK = {"100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9, "3,200 Gbit/s": 400e9}  # of a machine
GPU_MTBF_H = 50_700.0  # 419 unexpected ends in 54 days of 16,384 H100s  [Llama 3, Sec. 3.3.4]
RESTART_S = 180.0
DISK = 2e9  # bytes a second that a checkpoint is stored with
MFU = 0.4
RECIPE = PRESETS["imagenet64"]()


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def heads(*cells: str) -> None:
    print()
    row(*cells)
    row(*["---"] * len(cells))


def order_over(pictures: int, *, block: int, streams: int, window: int) -> Order:
    return Order(pictures, block=block, seed=1, window=window, streams=streams)


def order_table() -> None:
    heads("pictures", "order keeps", "at most", "first answer of an epoch", "index of all pictures, if it were held")
    for pictures in PICTURES:
        times = []
        for epoch in range(3):
            order = order_over(pictures, block=4_096, streams=64, window=16_384)
            began = time.perf_counter()
            order.at(epoch * pictures, 2_048)
            times.append(time.perf_counter() - began)
        tracemalloc.start()
        order = order_over(pictures, block=4_096, streams=64, window=16_384)
        for epoch in range(3):
            order.at(epoch * pictures, 2_048)
        kept, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        row(
            f"{pictures:.0e}",
            f"{kept / 2**20:.1f} MiB",
            f"{most / 2**20:.1f} MiB",
            f"{sorted(times)[1] * 1e3:.0f} ms",
            f"{pictures * INDEX.itemsize / 1e9:,.1f} GB",
        )


def manifest_of(shards: int) -> Manifest:
    """A manifest as long as that of so many shards."""
    names = (hashlib.sha256(str(n).encode()).hexdigest() for n in range(shards))
    entries = tuple(
        ShardEntry(split="train", pictures=4_096, bytes=4_096 * STORED, sha256=name, index_sha256=name)
        for name in names
    )
    return Manifest(
        resolution=64,
        classes=("picture",),
        train_counts=(4_096 * shards,),
        holdout_counts=(0,),
        shards=entries,
        processing=Processing(background="#ffffff"),
        recipe_digest="0" * 64,
        files=4_096 * shards,
        set_aside={},
    )


class Opening(NamedTuple):
    """Of a manifest, for each shard."""

    bytes: float
    seconds: float
    memory: float


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def opening(folder: Path, shards: int) -> Opening:
    """Measured on a real file, of a process that reads one."""
    made = manifest_of(shards)
    place = folder / "datasets" / made.digest[:16]
    manifest.publish(made, manifest.root_of(place))
    size = (place / manifest.FILE).stat().st_size
    del made
    before, began = resident(), time.perf_counter()
    loaded = manifest.load(place)
    taken, grown = time.perf_counter() - began, resident() - before
    assert len(loaded.shards) == shards
    return Opening(size / shards, taken / shards, grown / shards)


def manifest_table(folder: Path, shards: int) -> Opening:
    each = opening(folder, shards)
    print(f"\nmanifest, measured on one of {shards:,} shards: {each.bytes:.0f} bytes a shard to fetch,", end=" ")
    print(f"{each.seconds * 1e6:.0f} us and {each.memory:.0f} bytes of memory a shard to open")
    heads("pictures", "a shard", "shards", "manifest", "to open it", "memory of a worker", "HEADs before a stage")
    for pictures in PICTURES:
        for size in (256, 4_096, 100_000):
            count = -(-pictures // size)
            row(
                f"{pictures:.0e}",
                f"{size:,}",
                f"{count:,}",
                f"{count * each.bytes / 1e6:,.1f} MB",
                f"{count * each.seconds:,.1f} s",
                f"{count * each.memory / 2**30:,.2f} GiB",
                f"{2 * count:,}",
            )
    return each


class Counting:
    """A storage that has an index for every shard, and the shards, and counts what it is asked for."""

    uri = "s3://simulated"

    def __init__(self, index: bytes) -> None:
        self.index, self.indexes, self.fetched = index, 0, 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.indexes += name.endswith(".npy")
        return self.index

    def fetch(self, name: str, target: Path) -> None:
        self.fetched += 1
        target.write_bytes(self.tars[name])


def shards_over(count: int, pictures: int) -> tuple[Counting, list[ShardEntry]]:
    """So many shards of so many pictures, whose tars are their numbers."""
    index = io.BytesIO()
    np.save(index, np.zeros(pictures, INDEX), allow_pickle=False)
    storage = Counting(index.getvalue())
    one = hashlib.sha256(storage.index).hexdigest()
    tars = [f"{number:08d}".encode() for number in range(count)]
    entries = [
        ShardEntry(split="train", pictures=pictures, bytes=8, sha256=hashlib.sha256(tar).hexdigest(), index_sha256=one)
        for tar in tars
    ]
    storage.tars = {entry.tar: tar for entry, tar in zip(entries, tars, strict=True)}
    return storage, entries


def machines_of(order: Order, batch: int, gpus: int, positions: int) -> float:
    """On how many machines a shard is read in an epoch, of those that are read within `positions` from the first on."""
    share, shards = batch * PER_MACHINE // gpus, order.at(0, positions) // order.block
    machine = np.arange(positions) % batch // share
    pairs = np.unique(shards * (gpus // PER_MACHINE) + machine)
    return len(pairs) / len(np.unique(shards))


def indexes_a_picture(order: Order, shard: int, batch: int, gpus: int, batches: int) -> tuple[float, int]:
    """How often a worker opens a shard, for each picture it reads, and how many shards its part of a batch lies in: by the
    real `OpenShards`, after a beginning that is not counted."""
    share = batch // gpus
    parts = [order.at(k * batch, share) // order.block for k in range(batches)]  # of the first worker
    numbers = {shard: place for place, shard in enumerate(np.unique(np.concatenate(parts)).tolist())}
    storage, entries = shards_over(len(numbers), shard)
    opened = OpenShards(storage, entries)
    warm = batches // 2
    for k, part in enumerate(parts):
        if k == warm:
            before = storage.indexes
        for asked in np.unique(part).tolist():
            opened.get(numbers[asked])
    at_once = max(len(np.unique(part)) for part in parts)
    return (storage.indexes - before) / (share * (batches - warm)), at_once


def access_table(batches: int) -> dict[tuple, float]:
    heads(
        "GPUs", "global batch", "streams", "a shard", "shards in a worker's part", "indexes opened a picture",
        "machines that fetch each shard",
    )  # fmt: skip
    found = {}
    for gpus in GPUS:
        batch = max(2_048, 16 * gpus)
        for streams, shard in ((64, 4_096), (64, 100_000), (batch, 4_096)):
            window = 1_024 if streams > 64 else 16_384
            order = order_over(10**8, block=shard, streams=streams, window=window)
            opens, at_once = indexes_a_picture(order, shard, batch, gpus, batches)
            copies = machines_of(order, batch, gpus, 2 * streams * window)
            found[gpus, streams == batch, shard] = copies
            row(gpus, f"{batch:,}", f"{streams:,}", f"{shard:,}", at_once, f"{opens:.4f}", f"{copies:.2f}")
    print(f"\n(a process holds {OPEN_SHARDS} shards open, and {INDEX_BYTES >> 20} MiB of their indexes)")
    return found


def cache_table(folder: Path, shards: int, epochs: int) -> None:
    heads("local copies hold", "fetched an epoch, of all shards", "found here")
    for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0):
        order = order_over(shards * 32, block=32, streams=16, window=32)
        storage, entries = shards_over(shards, 32)
        cache = ShardCache(folder / f"copies-{share}", int(share * shards) * 8)
        opened = OpenShards(storage, entries, cache)
        for epoch in range(epochs):
            if epoch == 1:
                first = storage.fetched
            for position in range(epoch * len(order), (epoch + 1) * len(order), 32):
                for asked in dict.fromkeys((order.at(position, 32) // 32).tolist()):
                    opened.get(asked)
        again = (storage.fetched - first) / (epochs - 1) / shards
        row(f"{share:.0%}", f"{again:.0%}", f"{1 - again:.0%}")


def reading_table(copies: dict[tuple, float]) -> None:
    speed = device_named("h100").flop_per_s * MFU / training_cost(RECIPE.train, 64)
    print(
        f"\nimagenet64 on H100s at {MFU:.0%}: {speed:,.0f} pictures/s on each, {speed * STORED / 1e6:.0f} MB/s of shards"
    )
    heads(
        "GPUs", "streams", "a machine reads", "all machines", "requests an epoch of 1e8", "price", "an epoch of 1e8 takes"
    )  # fmt: skip
    for (gpus, aligned, shard), times in copies.items():
        if shard != 4_096:
            continue
        machines = gpus // PER_MACHINE
        rate = gpus * speed * STORED * times
        tars = -(-(10**8) // shard)
        asked = requests.fetched(shard * STORED) * (tars * times)
        asked += requests.fetched(shard * INDEX.itemsize + INDEX_HEADER) * (tars * times * PER_MACHINE)
        row(
            gpus,
            "as the batch" if aligned else 64,
            f"{rate / machines / 1e9:.2f} GB/s",
            f"{rate / 1e9:.1f} GB/s",
            f"{asked.get:,.0f}",
            f"{asked.price(PUT, GET):,.2f}",
            f"{10**8 / speed / gpus / 60:,.1f} min",
        )


def sharding_table() -> None:
    heads("pictures", "processor hours at 3 ms", "PUT and POST", "GET and HEAD", "price", "stored")
    for pictures in PICTURES:
        shards = -(-pictures // 4_096)
        asked = requests.source_read(pictures, 4) + requests.shards_made(
            pictures,
            chunks=-(-pictures // 256),
            chunk_bytes=256 * STORED,
            shards=shards,
            shard_bytes=4_096 * STORED,
            index_bytes=4_096 * INDEX.itemsize,
        )
        row(
            f"{pictures:.0e}",
            f"{pictures * 3e-3 / 3_600:,.1f}",
            f"{asked.put + asked.list:,.0f}",
            f"{asked.get + asked.head:,.0f}",
            f"{asked.price(PUT, GET):,.2f}",
            f"{pictures * STORED / 1e12:,.3f} TB",
        )


def training_table() -> None:
    device = device_named("h100")
    for name in ("imagenet64", "latent256"):
        recipe = PRESETS[name]()
        side = recipe.shard.resolution // recipe.train.codec_factor
        plan = plan_of(recipe.train, side=side, classes=1_000, world=8)
        exchanged = plan.gradient_bytes + plan.update_bytes / 2
        size = plan.checkpoint_bytes
        print(
            f"\n{name}: {plan.parameters / 1e6:,.0f} million parameters, {exchanged / 1e9:.2f} GB summed a step,",
            end=" ",
        )
        print(f"checkpoints of {size / 1e9:.1f} GB, {size / DISK:.1f} s to store at {DISK / 1e9:.0f} GB/s")
        heads(
            "GPUs", "a GPU's share", "a step computes", *(f"exchange at {name}" for name in NETWORK), "fails every",
            "best interval", "lost", "lost with one an hour",
        )  # fmt: skip
        for gpus in GPUS:
            batch = max(recipe.train.batch_size, 16 * gpus)
            compute = training_cost(recipe.train, side) * batch / gpus / (device.flop_per_s * MFU)
            links = (
                min(device.link_bytes_s, link) if gpus > PER_MACHINE else device.link_bytes_s
                for link in NETWORK.values()
            )
            mtbf, write = GPU_MTBF_H * 3_600 / gpus, size / DISK
            best = cluster.best_interval_s(write, mtbf)
            lost = (cluster.lost_share(interval, write, RESTART_S, mtbf) for interval in (best, 3_600.0))
            row(
                gpus,
                batch // gpus,
                f"{compute * 1e3:.0f} ms",
                *(f"{cluster.ring_s(exchanged, gpus, link) * 1e3:.0f} ms" for link in links),
                f"{mtbf / 86_400:.1f} days",
                f"{best / 60:.0f} min",
                *(f"{share:.2%}" for share in lost),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40_000, help="Of the manifest that is opened")
    parser.add_argument("--batches", type=int, default=24, help="That a worker reads in the simulation")
    parser.add_argument("--epochs", type=int, default=5, help="Of the simulation of local copies")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        order_table()
        manifest_table(Path(name), given.shards)
        cache_table(Path(name), 300, given.epochs)
        reading_table(access_table(given.batches))
        sharding_table()
        training_table()
    print(f"\nreport of 50,000 samples against 50,000: {statistics_s(50_000, 50_000) / 60:,.0f} min of a processor")


if __name__ == "__main__":
    main()
