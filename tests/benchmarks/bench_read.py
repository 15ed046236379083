"""How fast batches come off the disk, beside the decoder alone and other loaders: `python -m tests.benchmarks.bench_read`.

Every contender reads the same PNG or JPEG bytes, shuffled, as uint8 batches with labels, decoded anew each time; each
takes its turn on the same pictures, and what counts is the median over the turns of the ratio within a turn.  The limit
is the decoder's own time: two threads that decode the same bytes, in memory, into batches for a third; beside it stand
OpenCV's decoder of PNGs, likewise but one picture after the other, and the bound of a reader: the same from the tars, in
memory, in the order's sequence, each picture's sum compared.  Except for webdataset, whose `decode` is part of it, every
peer decodes with our decoder, so that loaders are compared.  Settings: the faster of no and two worker processes (kept
alive between passes, one torch thread each), otherwise as documented:

webdataset   WebDataset(shards, shardshuffle=...).shuffle(1000).decode("rgb8"), batched in the pipeline
litdata      optimize() into chunks of 64 MB, StreamingDataset(shuffle=True), StreamingDataLoader
torch        DataLoader over a Dataset of files, pictures as (3, H, W) tensors, the default collate function
mosaicml     MDSWriter, StreamingDataset(shuffle=True), DataLoader.  Its vision part wants torchvision, which is stood in
             for where it is missing, since nothing here uses it

A peer that is not installed says so.  The last figure is the time from nothing but the imports to the first batch of a
dataset of 10,000 shards.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import types
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from zlib_ng.zlib_ng import crc32

from diffusion.data import images, manifest
from diffusion.data.manifest import Manifest
from diffusion.data.order import Order
from diffusion.data.pictures.decode import decode_into, decode_rows
from diffusion.data.pictures.encode import encode_jpeg, encode_png
from diffusion.data.pictures.opencv import opencv
from diffusion.data.reader import ShardReader
from diffusion.data.shards import PackedSample, read_index
from diffusion.data.stream import batches
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from tests.dataset_of import publish

LIMITS = {  # of our rate over the contender's
    "png": {"decode alone": 0.85, "webdataset": 5.0, "litdata": 1.3},
    "jpeg": {"torch": 1.4},
}
FIRST_BATCH_MS = 50.0
SHARDS = 10_000

Pass = Callable[[], int]  # reads every picture once; returns how many


def pictures(kind: str, side: int, count: int) -> list[bytes]:
    """PNGs of the embedded drawings, or JPEGs of noise with the spectrum of photographs, about
    1 / f; each comes a few times."""
    if kind == "png":
        archive = str(resources.files("diffusion.data") / "embedded" / "noto-emoji-64.zip")
        with zipfile.ZipFile(archive) as files:
            names = [name for name in files.namelist() if name.endswith(".png")]
            own = [encode_png(images.decode(files.read(name), resolution=side, background="#ffffff")) for name in names]
    else:
        random, frequency = (
            np.random.default_rng(0),
            np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side))),
        )
        frequency = frequency.T**1.3 + 1e-3
        own = []
        for _ in range(128):
            spectrum = random.normal(size=(3, *frequency.shape, 2)).view(complex)[..., 0] / frequency
            waves = np.fft.irfft2(spectrum, (side, side)).transpose(1, 2, 0)
            waves = 0.3 * waves + waves.mean(2, keepdims=True)  # colours mostly agree
            own.append(encode_jpeg((128 + 45 * waves / waves.std()).clip(0, 255).astype(np.uint8), 90))
    return [bytes(bytearray(own[i % len(own)])) for i in range(count)]  # each in memory of its own, as in shards


def packed(data: list[bytes]) -> list[PackedSample]:
    return [PackedSample(f"{i:08x}", i % 3, {"captions": []}, image) for i, image in enumerate(data)]


def ours(ref: DatasetRef, batch: int, threads: int) -> Pass:
    reader = ShardReader(ref.uri, cache_mib=0, captions=False)
    order = Order(len(reader), max(reader.counts), seed=0, window=1024, streams=8)
    epoch = 0

    def run() -> int:
        nonlocal epoch
        epoch += 1
        share = batches(reader, order, batch, start=(epoch - 1) * len(order), stop=epoch * len(order), threads=threads)
        return sum(len(part.label) for part in share)

    return run


def decode_alone(data: list[bytes], side: int, batch: int, threads: int) -> Pass:
    parts = [data[start : start + batch] for start in range(0, len(data), batch)]
    pool = ThreadPoolExecutor(threads)

    def decoded(part: list[bytes]) -> np.ndarray:
        out = np.empty((len(part), side, side, 3), np.uint8)
        bad = decode_rows(part, out, range(len(part)))
        assert not bad
        return out

    return lambda: sum(len(out) for out in pool.map(decoded, parts))


def opencv_alone(data: list[bytes], batch: int, threads: int) -> Pass:
    """What most would take for the decoder of PNGs, without our short cut."""
    cv2 = opencv()
    parts = [data[start : start + batch] for start in range(0, len(data), batch)]
    pool = ThreadPoolExecutor(threads)

    def decoded(part: list[bytes]) -> np.ndarray:
        return np.stack([cv2.imdecode(np.frombuffer(own, np.uint8), cv2.IMREAD_COLOR_RGB) for own in part])

    return lambda: sum(len(out) for out in pool.map(decoded, parts))


def least_reader(ref: DatasetRef, side: int, batch: int, threads: int) -> Pass:
    """What no reader of shards in this order can do without, and nothing else."""
    reader = ShardReader(ref.uri)
    order = Order(len(reader), max(reader.counts), seed=0, window=1024, streams=8)
    spans = []
    for entry in reader.entries:
        tar, index = memoryview(reader.root.read(entry.tar)), read_index(reader.root, entry)
        columns = (index[name].tolist() for name in ("image_offset", "image_size", "image_crc32"))
        spans += [(tar, start, start + size, crc) for start, size, crc in zip(*columns, strict=True)]
    pool = ThreadPoolExecutor(threads)

    def read(part: np.ndarray) -> np.ndarray:
        out = np.empty((len(part), side, side, 3), np.uint8)
        stored = []
        for tar, start, end, crc in map(spans.__getitem__, part.tolist()):
            stored.append(data := tar[start:end])
            assert crc32(data) == crc
        bad = decode_rows(stored, out, range(len(part)), known=True)
        assert not bad
        return out

    def run() -> int:
        starts = range(0, len(order), batch)
        return sum(len(out) for out in pool.map(read, (order.at(i, min(batch, len(order) - i)) for i in starts)))

    return run


def decoded_chw(data: bytes, side: int) -> torch.Tensor:
    """What each item of the peers is, for the default collate function."""
    out = np.empty((side, side, 3), np.uint8)
    decode_into(data, out)
    return torch.from_numpy(out).permute(2, 0, 1)


def passes(loader: Iterable) -> Pass:
    return lambda: sum(len(label) for _, label in loader)


def kept(workers: int) -> dict:
    """Settings of DataLoader for that many worker processes."""
    return {"num_workers": workers} | ({"persistent_workers": True, "prefetch_factor": 4} if workers else {})


def webdataset(ref: DatasetRef, kind: str, batch: int, workers: int) -> Pass:
    import webdataset as wds

    reader = ShardReader(ref.uri)
    extension = {"png": "png", "jpeg": "jpg"}[kind]
    shards = [str(reader.root.path(entry.tar)) for entry in reader.entries]
    read = wds.WebDataset(
        shards, shardshuffle=len(shards), nodesplitter=wds.split_by_node, workersplitter=wds.split_by_worker
    )
    read = read.shuffle(1000).decode("rgb8", only=[extension, "cls"]).to_tuple(extension, "cls").batched(batch)
    return passes(wds.WebLoader(read, batch_size=None, **kept(workers)))


class Files(Dataset):
    """Pictures in files, their labels in a list."""

    def __init__(self, paths: list[Path], side: int) -> None:
        self.paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return decoded_chw(self.paths[i].read_bytes(), self.side), i % 3


def torch_files(data: list[bytes], folder: Path, side: int, batch: int, workers: int) -> Pass:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:08x}" for i in range(len(data))]
    for path, picture in zip(paths, data, strict=True):
        path.write_bytes(picture)
    return passes(DataLoader(Files(paths, side), batch, shuffle=True, **kept(workers)))


def itself(row: dict) -> dict:
    return row


def litdata(data: list[bytes], folder: Path, side: int, batch: int, workers: int) -> Pass:
    os.environ |= {"DATA_OPTIMIZER_CACHE_FOLDER": f"{folder}-c", "DATA_OPTIMIZER_DATA_CACHE_FOLDER": f"{folder}-d"}
    import litdata as ld

    class Decoded(ld.StreamingDataset):
        def __getitem__(self, i: object) -> tuple[torch.Tensor, int]:
            row = super().__getitem__(i)
            return decoded_chw(row["image"], side), row["label"]

    if not folder.exists():
        rows = [{"image": picture, "label": i % 3} for i, picture in enumerate(data)]
        ld.optimize(itself, rows, str(folder), chunk_bytes="64MB", num_workers=1, verbose=False)
    torch.multiprocessing.set_start_method("fork", force=True)  # optimize() leaves "spawn" behind, for everybody
    return passes(ld.StreamingDataLoader(Decoded(str(folder), shuffle=True), batch_size=batch, **kept(workers)))


_TORCHVISION = {
    "torchvision": (),
    "torchvision.datasets": ("VisionDataset",),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": ("to_tensor",),
}


def mosaicml(data: list[bytes], folder: Path, side: int, batch: int, workers: int) -> Pass:
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        import transformers  # noqa: F401  looks for the real one, so before there is another

        for name, contents in _TORCHVISION.items():
            module = sys.modules[name] = types.ModuleType(name)
            vars(module).update(dict.fromkeys(contents, object))
    from streaming import MDSWriter, StreamingDataset

    class Decoded(StreamingDataset):
        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            row = super().__getitem__(i)
            return decoded_chw(row["image"], side), row["label"]

    if not folder.exists():
        with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as out:
            for i, picture in enumerate(data):
                out.write({"image": picture, "label": i % 3})
    return passes(DataLoader(Decoded(local=str(folder), shuffle=True, batch_size=batch), batch, **kept(workers)))


def contenders(kind: str, side: int, count: int, batch: int, folder: Path) -> dict[str, Pass | str]:
    """What takes turns, by name; a reason in place of what cannot."""
    data = pictures(kind, side, count)
    samples = packed(data)
    ref = publish(
        LocalFolder(folder / "root"), folder, [samples[i : i + 1024] for i in range(0, count, 1024)], side, kind
    )
    found: dict[str, Pass | str] = {
        "ours": ours(ref, batch, 2),
        "decode alone": decode_alone(data, side, batch, 2),
        **({"OpenCV alone": opencv_alone(data, batch, 2)} if kind == "png" else {}),
        "least reader": least_reader(ref, side, batch, 2),
    }
    peers: dict[str, tuple[str, Callable[[int], Pass]]] = {
        "webdataset": ("webdataset", lambda workers: webdataset(ref, kind, batch, workers)),
        "litdata": ("litdata", lambda workers: litdata(data, folder / "litdata", side, batch, workers)),
        "torch": ("torch", lambda workers: torch_files(data, folder / "files", side, batch, workers)),
        "mosaicml": ("streaming", lambda workers: mosaicml(data, folder / "mds", side, batch, workers)),
    }
    for name, (module, make) in peers.items():
        if importlib.util.find_spec(module) is None:
            found[name] = "not installed"
            continue
        timed = {}
        for workers in (2,) if kind == "jpeg" and name == "torch" else (0, 2):
            run = make(workers)
            run()  # starts the workers
            started = time.perf_counter()
            run()
            timed[f"{name}, {workers} workers"] = time.perf_counter() - started, run
        best = min(timed, key=lambda each: timed[each][0])
        found[best] = timed[best][1]
    return found


def compare(kind: str, side: int, count: int, batch: int, turns: int) -> bool:
    """One table; whether every limit is kept."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = contenders(kind, side, count, batch, Path(folder))
        runs = {name: run for name, run in found.items() if not isinstance(run, str)}
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(turns + 1):
            for name in list(runs)[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                read = runs[name]()
                rate = read / (time.perf_counter() - started)
                assert read == count, f"{name} gave {read} of {count} pictures"
                if turn:
                    rates[name].append(rate)
        del runs, found["ours"]
    print(f"\n{side} px {kind.upper()}, batches of {batch}: ours {statistics.median(rates['ours']):,.0f} pictures/s")
    good = True
    for name, run in found.items():
        if isinstance(run, str):
            print(f"  {name:<24} {run}")
            continue
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        limit = LIMITS[kind].get(name.partition(",")[0])
        kept_limit = limit is None or ratio >= limit
        good &= kept_limit
        said = "" if limit is None else f"  limit {limit:.2f} {'kept' if kept_limit else 'MISSED'}"
        print(
            f"  {name:<24} {statistics.median(rates[name]):>9,.0f} pictures/s   ours is {ratio:5.2f} times that{said}"
        )
    return good


def first_batch(turns: int) -> bool:
    """Opening a dataset of SHARDS shards and reading 32 pictures of it; many entries name the same few shards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        root = LocalFolder(Path(folder, "root"))
        samples = packed(pictures("png", 32, 32 * 256))
        few = manifest.load(publish(root, Path(folder), [samples[i : i + 256] for i in range(0, 8192, 256)], 32).uri)
        entries = (few.shards * (SHARDS // len(few.shards) + 1))[:SHARDS]
        total = sum(entry.pictures for entry in entries)
        many = Manifest(**few.model_dump() | {"shards": entries, "train_counts": (total, 0, 0), "files": total})
        uri, digest = manifest.publish(many, root), many.digest  # which a reference states
        times = []
        for turn in range(turns):
            started = time.perf_counter()
            reader = ShardReader(uri, digest=digest)
            order = Order(len(reader), max(reader.counts), seed=turn, window=1024, streams=8)
            share = batches(reader, order, 32, threads=2)
            batch = next(share)
            times.append(1e3 * (time.perf_counter() - started))
            assert len(batch.label) == 32
            share.close()
            del reader, share  # else the next turn's time has the end of this one's 10,000 entries in it
    median, first = statistics.median(times), times[0]
    kept_limit = median <= FIRST_BATCH_MS
    print(
        f"\nfirst batch of 32 from {SHARDS:,} shards, {total:,} pictures: {median:.0f} ms (the very first {first:.0f}),"
        f" limit {FIRST_BATCH_MS:.0f} {'kept' if kept_limit else 'MISSED'}"
    )
    return kept_limit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--only", choices=("32", "64", "256", "first"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for name, kind, count, batch in (("32", "png", 20_480, 256), ("64", "png", 8_192, 256), ("256", "jpeg", 2_048, 32)):
        if options.only in (None, name):
            good &= compare(kind, int(name), count, batch, options.turns)
    if options.only in (None, "first"):
        good &= first_batch(9)
    sys.exit(not good)


if __name__ == "__main__":
    main()
