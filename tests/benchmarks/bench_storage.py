"""What S3 costs through our interface: `python -m tests.benchmarks.bench_storage`.

Against the tests' server (OpenStack Swift, one process on loopback), in turns that change places:

fetch   a 64 MB shard to a file: ours (four ranges at once, lengths checked, flushed to the disk) against boto3's
        `download_file` (ten threads, not flushed), and one plain GET thrown away, which is the server's limit
put     the same file: ours (parts with MD5, size asked for afterwards) against boto3's `upload_file`
read    4 kB ranges, one after another: ours against `get_object(Range=...)["Body"].read()`
cache   a verified entry that is there already: microseconds

Wall time is mostly the server's; CPU time is that of this process, so it is the clients'.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from diffusion.store.cache import ShardCache
from diffusion.store.s3 import S3Prefix
from tests.s3_server import s3_server

SIZE = 64_000_000
READS = 100


def turns(contenders: dict[str, Callable[[], object]], count: int) -> dict[str, tuple[list[float], list[float]]]:
    """Wall and CPU seconds of each contender's turns.  The first turn of each does not count."""
    times = defaultdict(lambda: ([], []))
    for turn in range(count + 1):
        order = list(contenders)[:: 1 if turn % 2 else -1]
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name]()
            if turn:
                times[name][0].append(time.perf_counter() - wall)
                times[name][1].append(time.process_time() - cpu)
    return times


def report(what: str, times: dict[str, tuple[list[float], list[float]]], amount: float, unit: str) -> None:
    print(f"\n{what:<8}{unit:>10}{'of boto3':>10}{'CPU ms':>10}{'of boto3':>10}")
    theirs = {place: statistics.median(times["boto3"][place]) for place in (0, 1)}
    for name, (walls, cpus) in times.items():
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        rate = statistics.median(t / w for w, t in zip(walls, times["boto3"][0], strict=True))
        print(f"{name:<8}{amount / wall:>10.1f}{rate:>9.2f}x{1e3 * cpu:>10.1f}{cpu / theirs[1]:>9.2f}x")


def main(count: int) -> None:
    with s3_server() as server, tempfile.TemporaryDirectory() as folder:
        os.environ.update(server.environment)
        storage, client = S3Prefix(server.bucket()), server.client
        shard, target = Path(folder, "shard"), Path(folder, "target")
        shard.write_bytes(os.urandom(SIZE))
        storage.put("shard", shard)
        place = {"Bucket": storage.bucket, "Key": "shard"}
        url = client.generate_presigned_url("get_object", Params=place)

        def plain() -> None:
            with urllib.request.urlopen(url) as answer:
                while answer.read1(2**18):
                    pass

        report(
            "fetch",
            turns(
                {
                    "ours": lambda: storage.fetch("shard", target),
                    "boto3": lambda: client.download_file(storage.bucket, "shard", str(target)),
                    "limit": plain,
                },
                count,
            ),
            SIZE / 1e6,
            "MB/s",
        )
        report(
            "put",
            turns(
                {
                    "ours": lambda: storage.put("ours", shard),
                    "boto3": lambda: client.upload_file(str(shard), storage.bucket, "theirs"),
                },
                count,
            ),
            SIZE / 1e6,
            "MB/s",
        )
        storage.put("small", os.urandom(1_000_000))
        place["Key"] = "small"
        starts = range(0, 5000 * READS, 5000)
        report(
            "read",
            turns(
                {
                    "ours": lambda: [storage.read("small", start, 4096) for start in starts],
                    "boto3": lambda: [
                        client.get_object(**place, Range=f"bytes={start}-{start + 4095}")["Body"].read()
                        for start in starts
                    ],
                },
                count,
            ),
            READS,
            "reads/s",
        )
        cache, asked = ShardCache(Path(folder, "cache"), 2 * SIZE), (storage, "shard", sha256(shard), SIZE)
        cache.path(*asked)
        began = time.perf_counter()
        for _ in range(1000):
            cache.path(*asked)
        print(f"\ncache   {1e3 * (time.perf_counter() - began):.1f} us for an entry that is there")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=7)
    main(parser.parse_args().turns)
