"""Killed and resumed elsewhere, is a run the same run?  `python -m tests.benchmarks.bench_elastic`.

Part 1, ours: one run of several epochs is killed with SIGKILL at random moments and goes on each time with another number
of ranks (1, 2, 3, 4, 6, 8) and reader threads (0 to 4), until each pair was used; each rank is a process.  What the run
may rely on is the number of global batches that all ranks had finished.  All its global batches together must be those of
the run that nobody disturbed, key by key, and hold each picture exactly once in each epoch.

Part 2, ours and others (those that are installed), each by its documented way: one epoch on 2 ranks with 1 worker each,
its state saved in the middle, all processes killed with SIGKILL two batches later, resumed from that state with the same
and with other numbers of ranks and workers, at the same global batch.  Global batches are compared as sets, so nobody is
charged for handing the same pictures to other ranks.  `lost` and `repeated` are pictures of the epoch, before and after
the kill together; in the row of the undisturbed run they are what the loader itself drops or pads.

The number of pictures is no multiple of the batch, as in real life.
"""

import argparse
import logging
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from diffusion.data.ingest import shard_dataset
from diffusion.data.order import Order
from diffusion.data.pictures.encode import encode_png
from diffusion.data.reader import ShardReader
from diffusion.data.stream import batches
from diffusion.recipe import ShardRecipe
from tests.benchmarks.elastic_peers import PEERS, Loader, Saved, Setting, Step, environment, installed
from tests.ports import free_port

PICTURES, BATCH = 1_003, 24
WORLDS, THREADS = (1, 2, 3, 4, 6, 8), range(5)
SAVED_AT, DIES_AT = 17, 19  # global batches
SCENES = {  # ranks, workers
    "undisturbed": (2, 1),
    "same again": (2, 1),
    "2 workers": (2, 2),
    "0 workers": (2, 0),
    "3 ranks": (3, 1),
    "4 ranks": (4, 1),
    "1 rank": (1, 1),
}
_fork = multiprocessing.get_context("fork")  # a child starts in milliseconds with everything imported


def order_over(reader: ShardReader) -> Order:
    return Order(len(reader), max(reader.counts), seed=1, window=64, streams=4)


def prepare(folder: Path, pictures: int) -> None:
    """A published dataset of noise, 16 px, in shards of uneven size."""
    rng = np.random.default_rng(0)
    source = folder / "source" / "noise"
    source.mkdir(parents=True)
    for i in range(pictures):
        (source / f"{i:06d}.png").write_bytes(encode_png(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)))
    ref = shard_dataset(source.parent, ShardRecipe(resolution=16, shard_size=90, holdout=0), folder / "store")
    (folder / "uri").write_text(ref.uri)


def share(folder: Path, world: int, rank: int, threads: int, start: int) -> Iterator[list[int]]:
    """The pictures of a rank's batches from position `start` on, by their place among all keys."""
    reader = ShardReader((folder / "uri").read_text())
    places = {key: place for place, key in enumerate(all_keys(reader))}
    for batch in batches(reader, order_over(reader), BATCH, start=start, rank=rank, world=world, threads=threads):
        yield [places[key] for key in batch.keys]


def all_keys(reader: ShardReader) -> list[str]:
    return reader.gather(np.arange(len(reader)))[2]


def epoch_of_ours(s: Setting) -> Iterator[Step]:
    """The first epoch.  Its last batch is filled up from the second one, which is left out here."""
    start = s.saved.step * BATCH if s.saved else 0
    batches_left = -(-(s.pictures - start) // BATCH)
    for number, batch in enumerate(islice(share(s.folder, s.world, s.rank, s.workers, start), batches_left)):
        first = start + number * BATCH + s.rank * s.batch
        yield batch[: max(0, s.pictures - first)], lambda: None


OURS = Loader("ours", "diffusion", "position is an argument: any ranks that divide the batch", prepare, epoch_of_ours)


# Part 1


def worker(folder: Path, world: int, rank: int, threads: int, start: int, together: Barrier) -> None:
    """Write each batch's pictures, a line at a time, in step with the other ranks, until killed."""
    with open(folder / f"rank-{rank}", "w", buffering=1) as out:
        for batch in share(folder, world, rank, threads, start):
            out.write(" ".join(map(str, batch)) + "\n")
            together.wait()  # as ranks do that add up their gradients


def lines(path: Path) -> list[list[int]]:
    """The whole lines of a file: the last may be cut short."""
    text = path.read_text() if path.exists() else ""
    return [[int(number) for number in line.split()] for line in text[: text.rfind("\n") + 1].splitlines()]


def killed_at_random(folder: Path, seed: int) -> bool:
    rng = random.Random(seed)
    pairs = [(world, threads) for world in WORLDS for threads in THREADS]
    rng.shuffle(pairs)
    undisturbed, seen = share(folder, 1, 0, 0, 0), []
    print(f"ours: {len(pairs)} kills, {PICTURES} pictures, global batches of {BATCH}")
    right = True
    for world, threads in pairs:
        for rank in range(world):
            (folder / f"rank-{rank}").unlink(missing_ok=True)
        start = len(seen) * BATCH
        together = _fork.Barrier(world)
        arguments = [(folder, world, rank, threads, start, together) for rank in range(world)]
        ranks = [_fork.Process(target=worker, args=each) for each in arguments]
        for process in ranks:
            process.start()
        goal = rng.randint(1, 30)
        while min(len(lines(folder / f"rank-{rank}")) for rank in range(world)) < goal:
            time.sleep(0.005)
        for process in ranks:
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join()
        parts = [lines(folder / f"rank-{rank}") for rank in range(world)]
        done = [list(chain(*step)) for step in zip(*parts, strict=False)]
        same = done == list(islice(undisturbed, len(done)))
        right &= same
        print(
            f"  {world} ranks x {threads} threads, from batch {len(seen):4d}: killed after {len(done):3d} batches:"
            f" {'identical' if same else 'DIFFERENT'}"
        )
        seen += done
    flat = list(chain(*seen))
    epochs = [sorted(flat[i : i + PICTURES]) for i in range(0, len(flat) - PICTURES + 1, PICTURES)]
    once = all(epoch == list(range(PICTURES)) for epoch in epochs)
    print(f"  {len(seen)} global batches, {len(epochs)} whole epochs, each picture once in each: {once}\n")
    return right and once and len(epochs) > 1


# Part 2


def child(loader: Loader, setting: Setting, port: int, dies: bool, out: Path) -> None:
    os.setpgid(0, 0)  # so that the loader's own workers die with their rank
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # others warn a lot; what fails becomes a row
    environment(setting.rank, setting.world, port)
    with open(out, "wb") as file:
        try:
            for step, (batch, state) in enumerate(loader.read(setting), 1):
                kept = state() if dies and step == SAVED_AT else None
                pickle.dump((sorted(batch), kept), file)
                file.flush()
                if dies and step == DIES_AT:
                    os.killpg(0, signal.SIGKILL)
        except Exception as error:  # of any kind: it becomes a row of the table
            pickle.dump(f"{type(error).__name__}: {error}".strip().split("\n")[-1], file)
    os._exit(0)  # some loaders' threads would keep it


class Refused(Exception):
    pass


def play(
    loader: Loader, folder: Path, world: int, workers: int, saved: Saved | None = None, *, dies: bool = False
) -> tuple[list[list[int]], Saved]:
    """A run on `world` ranks -> its global batches, and what it saved."""
    port = free_port()
    outs = [folder / f"out-{rank}" for rank in range(world)]
    ranks = []
    for rank, out in enumerate(outs):
        setting = Setting(folder, PICTURES, rank, world, workers, BATCH // world, saved)
        ranks.append(_fork.Process(target=child, args=(loader, setting, port, dies, out)))
        ranks[-1].start()
    for process in ranks:
        process.join(60)
    for process in ranks:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            raise Refused("did not end within a minute")
    parts = []
    for out in outs:
        parts.append([])
        with open(out, "rb") as file:
            while True:
                try:
                    record = pickle.load(file)
                except EOFError:
                    break
                if isinstance(record, str):
                    raise Refused(record)
                parts[-1].append(record)
    states = [record[1] for part in parts for record in part if record[1] is not None]
    longest = max(map(len, parts))
    return [sorted(i for part in parts if step < len(part) for i in part[step][0]) for step in range(longest)], Saved(
        SAVED_AT, states or [None]
    )


def row(
    name: str, said: str, batches_seen: list[list[int]] | None = None, first: list[list[int]] | None = None
) -> bool:
    """Print a row -> whether the batches are those of the undisturbed run `first`, nothing lost or repeated."""
    if batches_seen is None:
        print(f"  {name:12} {said}")
        return False
    counts = Counter(i for batch in batches_seen for i in batch)
    lost, repeated = PICTURES - len(counts), counts.total() - len(counts)
    if first is not None and not said:
        differs = next((n for n, pair in enumerate(zip_longest(batches_seen, first)) if pair[0] != pair[1]), None)
        said = "identical" if differs is None else f"differs from batch {differs}"
    print(f"  {name:12} {said:24} lost {lost:4d}   repeated {repeated:4d}")
    return said == "identical" and not lost and not repeated


def resumed_elsewhere(loader: Loader, folder: Path) -> bool:
    """The loader's table -> whether every row is identical and complete."""
    print(f"{loader.name}: {loader.says!r}" if loader is not OURS else f"{loader.name}: {loader.says}")
    if not installed(loader):
        print("  not installed")
        return False
    folder.mkdir()
    loader.prepare(folder, PICTURES)
    scenes = iter(SCENES.items())
    name, (world, workers) = next(scenes)
    try:
        first, _ = play(loader, folder, world, workers)
        row(name, f"{len(first)} global batches", first)
        before, saved = play(loader, folder, world, workers, dies=True)
    except Refused as refusal:
        return row(name, f"failed: {refusal}")
    right = before == first[: len(before)]
    if not right:
        print("  a second run from the start gives other batches")
    for name, (world, workers) in scenes:
        try:
            after, _ = play(loader, folder, world, workers, saved)
        except Refused as refusal:
            right = row(name, f"refused: {str(refusal)[:100]}")
            continue
        right &= row(name, "", before[:SAVED_AT] + after, first)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills in part 1")
    parser.add_argument("--only", help="part 2 with loaders whose name contains this")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="bench-elastic-") as root:
        wrong = []
        if not options.only:
            ours = Path(root, "killed")
            ours.mkdir()
            prepare(ours, PICTURES)
            if not killed_at_random(ours, options.seed):
                wrong.append("killed at random")
        print(
            f"One epoch of {PICTURES} pictures on 2 ranks with 1 worker each, global batches of {BATCH}; saved after"
            f" {SAVED_AT}, killed after {DIES_AT}, resumed:"
        )
        for number, loader in enumerate((OURS, *PEERS)):
            if (options.only or "") in loader.name:
                exact = resumed_elsewhere(loader, Path(root, str(number)))
                if loader is OURS and not exact:
                    wrong.append("resumed elsewhere")
    print(f"ours FAILED: {', '.join(wrong)}" if wrong else "passed: ours is identical wherever it ran")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
