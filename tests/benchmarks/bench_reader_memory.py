"""Memory and time of the reader over a million pictures: `python -m tests.benchmarks.bench_reader_memory`.

A dataset of that many pictures, whose 8 px PNGs lie in a few shards that its manifest names again and again: the reader
cannot know, and opens, indexes and reads each as its own.  Nothing is kept decoded.  Resident memory (VmRSS) is read at
every batch, since the shards in use come and go with the stretches of the order, and what counts is the most within a
tenth of the pictures; after the first tenth it should not grow, and a picture should cost the same all the way, in time of
the processor.  A busy machine has its slow minutes: so between the batches the decoder unpacks one and the same batch, and
what counts is a tenth's time over the decoder's in the same tenth.
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from diffusion.data import manifest
from diffusion.data.manifest import Manifest
from diffusion.data.order import Order
from diffusion.data.pictures.decode import decode_rows
from diffusion.data.pictures.encode import encode_png
from diffusion.data.reader import ShardReader
from diffusion.data.shards import PackedSample
from diffusion.data.stream import batches
from diffusion.store.storage import LocalFolder
from tests.dataset_of import publish

SHARD, DISTINCT, SIDE, BATCH = 256, 64, 8, 256
GROWTH_MIB = 8.0
CONSTANT = 1.25  # the slowest tenth over the fastest, each over the decoder's time in it
YARDSTICK = 8  # batches from one turn of the decoder alone to the next


def resident_mib() -> float:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def dataset(root: LocalFolder, folder: Path, count: int) -> str:
    """The URI of a dataset of `count` pictures."""
    random = np.random.default_rng(0)
    samples = [
        PackedSample(
            f"{i:08x}",
            0,
            {"captions": [[f"picture {i}", 1.0]]},
            encode_png(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)),
        )
        for i in range(SHARD * DISTINCT)
    ]
    shards = [samples[start : start + SHARD] for start in range(0, len(samples), SHARD)]
    few = manifest.load(publish(root, folder, shards, SIDE).uri)
    entries = (few.shards * (count // SHARD // DISTINCT + 1))[: count // SHARD]
    total = sum(entry.pictures for entry in entries)
    many = few.model_dump() | {"shards": entries, "train_counts": (total, 0, 0), "files": total}
    return manifest.publish(Manifest(**many), root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        uri = dataset(LocalFolder(Path(folder, "root")), Path(folder), options.pictures)
        before = resident_mib()
        reader = ShardReader(uri, cache_mib=0)
        order = Order(len(reader), SHARD, seed=0, window=1024, streams=8)
        print(f"{len(reader):,} pictures in {len(reader.entries):,} shards; {before:.0f} MiB before opening")
        tenth = len(reader) // 10 // BATCH * BATCH
        times, alone, memory, seen, most = [], [], [], 0, 0.0
        same, out = [encode_png(picture) for picture in reader.gather(np.arange(BATCH)).images], None
        started, decoder, turns = time.process_time(), 0.0, 0
        for batch in batches(reader, order, BATCH, stop=10 * tenth, threads=2):
            seen += len(batch.label)
            most = max(most, resident_mib())
            if seen // BATCH % YARDSTICK == 0:
                before, out = time.thread_time(), np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
                assert not decode_rows(same, out, range(BATCH))
                decoder, turns = decoder + time.thread_time() - before, turns + 1
            if seen % tenth == 0:
                times.append(time.process_time() - started - decoder)
                alone.append(decoder / turns)
                memory.append(most)
                most = 0.0
                print(
                    f"{seen:>9,} read  {memory[-1]:6.0f} MiB at most  {1e6 * times[-1] / tenth:5.1f} us a picture,"
                    f" of the decoder alone {1e6 * alone[-1] / BATCH:4.1f}",
                    flush=True,
                )
                started, decoder, turns = time.process_time(), 0.0, 0
    costs = [own / yardstick for own, yardstick in zip(times, alone, strict=True)]
    growth, slowest = max(memory) - memory[0], max(costs) / min(costs)
    good = growth <= GROWTH_MIB and slowest <= CONSTANT
    print(
        f"grown by {growth:.1f} MiB after the first tenth (limit {GROWTH_MIB:.0f}); slowest tenth {slowest:.2f} times the"
        f" fastest (limit {CONSTANT}; without the yardstick {max(times) / min(times):.2f}): {'kept' if good else 'MISSED'}"
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
