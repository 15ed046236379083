"""What goes wrong between a bucket of pictures and batches, done on purpose: a network that fails, processes that are
killed, disks that are full, files that are damaged.  Everything here ends with a dataset, or batches, to compare.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import numpy as np
import pytest

from diffusion.adapters.ray_data import ray_each
from diffusion.data import datasets, ingest, manifest
from diffusion.data.images import encode_png
from diffusion.data.lint import lint
from diffusion.data.order import Order
from diffusion.data.reader import ShardReader
from diffusion.data.shards import read_index
from diffusion.data.stream import batches
from diffusion.recipe import ShardRecipe, digest_of
from diffusion.store.cache import ShardCache
from diffusion.store.retry import Patience, retries
from diffusion.store.s3 import S3Prefix
from diffusion.store.storage import Storage
from tests.faulty_proxy import FLIPPED, FaultyProxy

ROOT = Path(__file__).parents[1]
RECIPE = ShardRecipe(resolution=16, shard_size=16, holdout=0.05)
BATCH, SEED = 24, 1
PAIRS = [(world, threads) for world in (1, 2, 3, 4, 6) for threads in range(3)]
QUICK = ("reset", "reset after", "500", "503", "truncated", "short")
KINDS = (*QUICK * 8, "stall", "trickle")  # the last two cost a client's patience each
HURRY = Patience(attempts=12, first_s=0.001, longest_s=0.02, silent_s=2.0)
_server = multiprocessing.get_context("forkserver")  # forks of a process without threads, with everything imported
_server.set_forkserver_preload(["tests.faults", "boto3"])


class Network(FaultyProxy):
    """Also flips bits of a dataset's shards and indexes, of each once: who is told something else twice takes it for the
    truth."""

    def __init__(self, upstream: str, **arguments: object) -> None:
        super().__init__(upstream, **{"rate": 0.3, "kinds": KINDS, **arguments})
        self._flipped: set[str] = set()

    def fault(self, request: str) -> str | None:
        kind = super().fault(request)
        with self._lock:
            if kind == FLIPPED and ("/shards/" not in request or request in self._flipped):
                return None
            if kind == FLIPPED:
                self._flipped.add(request)
        return kind


@contextmanager
def hurried() -> Iterator[None]:
    """Small tasks, so that a kill strikes between them too, and next to no waits before asking again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "_CHUNK_FILES", 16)
        patch.setitem(S3Prefix.__init__.__kwdefaults__, "patience", HURRY)
        yield


@contextmanager
def through(network: FaultyProxy) -> Iterator[dict[str, str]]:
    """os.environ leads there; what another process must set to go there too."""
    with hurried(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", network.url)
        yield {key: value for key, value in os.environ.items() if key.startswith("AWS_")}


def pictures(folder: Path, count: int) -> Path:
    """Noise in three classes, some with captions; one file in fifty is empty, cut or a copy."""
    rng, last = np.random.default_rng(0), b""
    for i in range(count):
        path = folder / f"class-{i % 3}" / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encode_png(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        spoilt = {7: b"", 57: data[:-300], 107: last}.get(i % 150)
        path.write_bytes(data if spoilt is None else spoilt)
        if i % 2:
            path.with_suffix(".txt").write_text(f"picture {i}")
        last = data
    return folder


def uploaded(folder: Path, storage: Storage) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: storage.put(str(path.relative_to(folder)), path), files))


# A child tells what it did in lines of JSON, so that one killed has told all but its last moment.


def child(function: Callable[..., None], environment: dict[str, str], out: Path, *arguments: object) -> None:
    """`function(tell, ...)`: what it tells goes to `out`, each with the retries so far."""
    os.environ.update(environment)
    with hurried(), open(out, "w", buffering=1) as file:
        function(lambda what: file.write(json.dumps([what, retries()]) + "\n"), *arguments)


def told(out: Path) -> tuple[list, Counter]:
    """What a child has told so far, and its retries."""
    text = out.read_text() if out.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be cut short
    return [what for what, _ in lines], Counter(lines[-1][1]) if lines else Counter()


def killed(processes: list, until: Callable[[], bool]) -> int:
    """Kill them when `until` says so; how many were still at work.  Raises RuntimeError where one fails."""
    while not until() and all(process.exitcode is None for process in processes):
        time.sleep(0.005)
    at_work = 0
    for process in processes:
        process.kill()
        process.join()
        at_work += process.exitcode == -signal.SIGKILL
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError("a process failed, as is told above")
    return at_work


# Sharding


def shard(tell: Callable[[object], object], source: str, root: str, work: str) -> None:
    """Tells of each task done, and the dataset."""

    def each(function: Callable[[dict], dict], tasks: Iterable[dict]) -> Iterator[dict]:
        for task in tasks:
            yield function(task)
            tell(function.__name__)

    tell(ingest.shard_dataset(source, RECIPE, root, Path(work), each=each).uri)


def shard_with_kills(
    environment: dict[str, str], source: str, root: str, folder: Path, seed: int = 0
) -> tuple[str, int, Counter]:
    """The dataset's URI, kills, retries."""
    rng, kills, retried, out = random.Random(seed), 0, Counter(), folder / "told"
    folder.mkdir()
    while True:
        out.unlink(missing_ok=True)
        process = _server.Process(target=child, args=(shard, environment, out, source, root, str(folder / "work")))
        process.start()
        goal, delay_s = rng.randint(1, 5), rng.random() * 0.1  # from the middle of a task to that of publishing

        def until(goal: int = goal, delay_s: float = delay_s) -> bool:
            if len(told(out)[0]) < goal:
                return False
            time.sleep(delay_s)
            return True

        kills += killed([process], until)
        done, again = told(out)
        retried += again
        if done and done[-1].startswith(root):
            return done[-1], kills, retried


def mortal(function: Callable[[dict], dict], marks: str, task: dict) -> dict:
    """The task; one in three in a worker that is killed meanwhile, the first time."""
    name = digest_of(task)
    with hurried():
        if int(name, 16) % 3 == 0 and not Path(marks, name).exists():
            Path(marks, name).touch()
            Timer(random.random() * 0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(task)


def shard_on_ray(source: str, root: str, folder: Path) -> tuple[str, int]:
    """The dataset's URI, and workers killed.  On the Ray that runs in this process."""

    def each(function: Callable[[dict], dict], tasks: Iterable[dict]) -> Iterator[dict]:
        return ray_each(partial(mortal, function, str(marks)), tasks)

    marks = folder / "marks"
    marks.mkdir(parents=True)
    made = ingest.shard_dataset(source, RECIPE, root, folder / "work", each=each)
    return made.uri, len(list(marks.iterdir()))


# Full disks: a small one of our own


def on_small_disk(what: str, *arguments: object) -> list:
    """What the function of this name in here prints, in JSON: it is called in a process that may mount.  Raises NoDisk."""
    program = f"import sys; from tests.faults import {what}; {what}(*sys.argv[1:])"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        raise NoDisk(f"no small file system can be had here: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


class NoDisk(Exception):
    """No file system can be mounted here."""


def _growing(disk: str, step: int, work: Callable[[], None]) -> list[str]:
    """Do `work` again and again until it ends, with `step` bytes more whenever the disk is full; what was said then."""
    said = []
    Path(disk).mkdir()
    while True:
        option = f"{'remount,' if said else ''}size={(len(said) + 1) * step}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", disk], check=True)
        try:
            work()
            return said
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            said.append(str(error))


def shard_on_small_disk(source: str, disk: str, target: str, work: str, step: str) -> None:
    """Prints what was said, and the dataset, which is in the folder `target` then.  work: "" for a folder on the disk."""
    made = []

    def shard() -> None:
        made.append(ingest.shard_dataset(source, RECIPE, f"{disk}/root", Path(work) if work else None))

    with hurried():
        said = _growing(disk, int(step), shard)
    shutil.copytree(f"{disk}/root", target)
    print(json.dumps([said, made[-1].digest]))


def read_on_small_disk(uri: str, disk: str, stop: str) -> None:
    """Prints what was said, and the batches up to position `stop`."""
    seen = []
    with hurried():
        reader = ShardReader(uri, shards=ShardCache(f"{disk}/cache", 2**30), cache_mib=0)

        def work() -> None:
            for batch in read(reader, len(seen) * BATCH, int(stop)):
                seen.append(batch)

        said = _growing(disk, 2**17, work)
    print(json.dumps([said, seen]))


# Reading


def read(reader: ShardReader, start: int, stop: int, world: int = 1, rank: int = 0, threads: int = 2) -> Iterator[list]:
    """Of each batch its samples: key, and a sum over pixels, label and caption."""
    order = Order(len(reader), max(reader.counts), seed=SEED, window=64, streams=4)
    for batch in batches(
        reader, order, BATCH, start=start, stop=stop, world=world, rank=rank, threads=threads, seed=SEED
    ):
        yield [
            [key, zlib.crc32(pixels.numpy().tobytes() + f"{label} {text}".encode())]
            for key, pixels, label, text in zip(
                batch.keys, batch.images, batch.label.tolist(), batch.captions, strict=True
            )
        ]


def read_rank(
    tell: Callable[[object], object], uri: str, cache: str, room: int, start: int, stop: int, world: int, *rest: int
) -> None:
    """Tells of each batch."""
    reader = ShardReader(uri, shards=ShardCache(cache, room), cache_mib=0)
    for batch in read(reader, start, stop, world, *rest):
        tell(batch)


class Reading(NamedTuple):
    """Global batches as they were seen, and what was done meanwhile."""

    seen: list
    kills: int
    spoilt: int  # copies in the cache
    retried: Counter


def read_with_kills(
    environment: dict[str, str], uri: str, plain: ShardReader, stop: int, folder: Path, seed: int = 0
) -> Reading:
    """Up to position `stop`.  plain: the same dataset where it is whole."""
    rng, seen, kills, spoilt, retried = random.Random(seed), [], 0, 0, Counter()
    folder.mkdir()
    cache, room = folder / "cache", sum(entry.bytes for entry in plain.entries) // 4
    pairs = rng.sample(PAIRS, len(PAIRS))
    for world, threads in cycle(pairs):
        outs = [folder / f"rank-{rank}" for rank in range(world)]
        ranks = []
        for rank, out in enumerate(outs):
            out.unlink(missing_ok=True)
            asked = (uri, str(cache), room, len(seen) * BATCH, stop, world, rank, threads)
            ranks.append(_server.Process(target=child, args=(read_rank, environment, out, *asked)))
            ranks[-1].start()
        goal = rng.randint(1, 8)

        def until(goal: int = goal, outs: list[Path] = outs) -> bool:
            return min(len(told(out)[0]) for out in outs) >= goal

        kills += killed(ranks, until)
        parts = [told(out) for out in outs]
        seen += [list(chain(*step)) for step in zip(*(batches for batches, _ in parts), strict=False)]
        for _, again in parts:
            retried += again
        if len(seen) * BATCH >= stop:
            return Reading(seen, kills, spoilt, retried)
        spoilt += spoil_copies(cache, plain, rng)


def spoil_copies(cache: Path, plain: ShardReader, rng: random.Random) -> int:
    """Damage every copy: a bit of each of its pictures is another, its end is missing, or all of it."""
    entries = {entry.sha256: entry for entry in plain.entries}
    copies = [path for path in cache.iterdir() if path.name in entries]
    for path in copies:
        match rng.choice(("flip", "flip", "cut", "gone")):
            case "flip":
                for row in read_index(plain.root, entries[path.name]):
                    flip(path, int(row["image_offset"]) + rng.randrange(int(row["image_size"])))
            case "cut":
                os.truncate(path, rng.randrange(path.stat().st_size))
            case "gone":
                path.unlink()
    return len(copies)


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), place)


# At rest


def damage_at_rest(uri: str, seed: int = 0) -> list[str]:
    """Change, cut or remove every second shard's tar or index; which, in the order of the shards."""
    root, rng, names = manifest.root_of(uri), random.Random(seed), []
    for entry in manifest.load(uri).shards[::2]:
        name = rng.choice((entry.tar, entry.index))
        data = root.read(name)
        place = rng.randrange(len(data))
        match rng.choice(("flip", "cut", "gone")):
            case "flip":
                root.put(name, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            case "cut":
                root.put(name, data[:place])
            case "gone":
                root.remove(name)
        names.append(name)
    return names


def repaired(uri: str, source: str, work: Path) -> str:
    """Make the dataset again after what lint names was removed, as every message about damage says; its URI."""
    root = manifest.root_of(uri)
    for finding in lint(datasets.opened(uri)):
        root.remove(finding.place)
    root.remove(f"datasets/{uri.rpartition('/')[2]}/{manifest.FILE}")
    return ingest.shard_dataset(source, RECIPE, root, work).uri
