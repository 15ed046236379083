"""Other loaders in one shape, each by its documented way: what `bench_elastic` interrupts and resumes.

A loader's `prepare` writes pictures 0 to n - 1 (here: their numbers) in its own format.  Its `read` is one rank: it yields
the numbers of a batch and a function that gives the state to save at that point, for one epoch.  `Saved` is what a
killed run left.
"""

import importlib
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHARD, BUFFER, SEED = 50, 100, 1  # pictures per shard, places of a shuffle buffer


class Saved(NamedTuple):
    step: int  # global batches seen
    states: list[Any]  # of each rank then


class Setting(NamedTuple):
    folder: Path
    pictures: int
    rank: int
    world: int
    workers: int
    batch: int  # of this rank
    saved: Saved | None

    @property
    def state(self) -> Any:
        """This rank's saved state; where there are more ranks now than then, that of another in turn."""
        return self.saved.states[self.rank % len(self.saved.states)]


Step = tuple[list[int], Callable[[], Any]]


class Loader(NamedTuple):
    name: str
    package: str  # what must be installed
    says: str  # of resuming with another number of ranks or workers, in its documentation or from its author
    prepare: Callable[[Path, int], None]
    read: Callable[[Setting], Iterator[Step]]


def installed(loader: Loader) -> bool:
    return all(importlib.util.find_spec(name) for name in loader.package.split())


def in_shards(pictures: int) -> Iterator[list[int]]:
    for start in range(0, pictures, SHARD):
        yield list(range(start, min(start + SHARD, pictures)))


def _no_vision() -> None:
    """Let `streaming` be imported where no torchvision fits the installed torch: it names three things of it, for picture
    datasets that are not used here.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision"):
        return
    for module in ("transformers.feature_extraction_utils", "transformers.tokenization_utils_base"):
        importlib.import_module(module)  # they look for torchvision too, and must not find this one
    names = {"datasets": ("VisionDataset", "CIFAR10"), "transforms.functional": ("to_tensor",)}
    for module in ("", ".datasets", ".transforms", ".transforms.functional"):
        sys.modules[f"torchvision{module}"] = types.ModuleType(f"torchvision{module}")
    for module, members in names.items():
        for member in members:
            setattr(sys.modules[f"torchvision.{module}"], member, object)


def _mosaic_prepare(folder: Path, pictures: int) -> None:
    _no_vision()
    from streaming import MDSWriter

    with MDSWriter(out=str(folder / "mds"), columns={"id": "int"}, size_limit=SHARD * 16) as out:
        for i in range(pictures):
            out.write({"id": i})


def _mosaic(algorithm: str) -> Callable[[Setting], Iterator[Step]]:
    def read(s: Setting) -> Iterator[Step]:
        _no_vision()
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        dataset = StreamingDataset(
            local=str(s.folder / "mds"),
            batch_size=s.batch,
            shuffle=True,
            shuffle_seed=SEED,
            shuffle_algo=algorithm,
            num_canonical_nodes=8,
        )
        loader = StreamingDataLoader(dataset, batch_size=s.batch, num_workers=s.workers)
        if s.saved:
            loader.load_state_dict(s.state)
        for batch in loader:
            yield batch["id"].tolist(), loader.state_dict

    return read


def _litdata_prepare(folder: Path, pictures: int) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder / "lit"), chunk_size=SHARD)
    for i in range(pictures):
        cache[i] = i
    cache.done()
    cache.merge()


def _litdata(drop_last: bool | None) -> Callable[[Setting], Iterator[Step]]:
    def read(s: Setting) -> Iterator[Step]:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(str(s.folder / "lit"), shuffle=True, seed=SEED, drop_last=drop_last)
        loader = StreamingDataLoader(dataset, batch_size=s.batch, num_workers=s.workers)
        if s.saved:
            loader.load_state_dict(s.state)
        for batch in loader:
            yield batch.tolist(), loader.state_dict

    return read


def _webdataset_prepare(folder: Path, pictures: int) -> None:
    import webdataset as wds

    (folder / "wds").mkdir()
    for number, part in enumerate(in_shards(pictures)):
        with wds.TarWriter(str(folder / f"wds/{number:03d}.tar")) as out:
            for i in part:
                out.write({"__key__": f"{i:06d}", "cls": i})


def _webdataset(s: Setting) -> Iterator[Step]:
    import webdataset as wds

    tars = sorted(str(path) for path in (s.folder / "wds").glob("*.tar"))
    pipeline = (
        wds.WebDataset(tars, shardshuffle=100, detshuffle=True, seed=SEED, nodesplitter=wds.split_by_node)
        .compose(wds.detshuffle(BUFFER, seed=SEED))
        .decode()
        .to_tuple("cls")
    )
    loader = wds.WebLoader(pipeline, batch_size=s.batch, num_workers=s.workers)
    for (batch,) in itertools.islice(loader, s.saved.step if s.saved else 0, None):
        yield batch.tolist(), lambda: None


def _datasets_prepare(folder: Path, pictures: int) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    Dataset.from_dict({"id": list(range(pictures))}).save_to_disk(folder / "hf")


def _datasets(s: Setting) -> Iterator[Step]:
    from datasets import load_from_disk
    from datasets.distributed import split_dataset_by_node
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = load_from_disk(s.folder / "hf").to_iterable_dataset(num_shards=24).shuffle(seed=SEED, buffer_size=BUFFER)
    dataset = split_dataset_by_node(dataset, rank=s.rank, world_size=s.world)
    loader = StatefulDataLoader(dataset, batch_size=s.batch, num_workers=s.workers)
    if s.saved:
        loader.load_state_dict(s.state)
    for batch in loader:
        yield batch["id"].tolist(), loader.state_dict


def _torchdata(s: Setting) -> Iterator[Step]:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    numbers = range(s.pictures)
    sampler = StatefulDistributedSampler(numbers, num_replicas=s.world, rank=s.rank, shuffle=True, seed=SEED)
    loader = StatefulDataLoader(numbers, batch_size=s.batch, sampler=sampler, num_workers=s.workers)
    if s.saved:
        loader.load_state_dict(s.state)
    for batch in loader:
        yield batch.tolist(), loader.state_dict


def environment(rank: int, world: int, port: int) -> None:
    """What `torchrun` sets, and litdata's name for the rank."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GLOBAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"NNODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


MOSAIC_SAYS = "samples are in the same order regardless of the number of GPUs, nodes, or CPU workers (README)"
LITDATA_SAYS = (
    "num_workers and world_size may change: LitData drops a global sample_in_epoch prefix and restripes (README)"
)
PEERS = (
    Loader("mosaicml-streaming, py1e", "streaming transformers", MOSAIC_SAYS, _mosaic_prepare, _mosaic("py1e")),
    Loader("mosaicml-streaming, py1s", "streaming transformers", MOSAIC_SAYS, _mosaic_prepare, _mosaic("py1s")),
    Loader("litdata", "litdata", LITDATA_SAYS, _litdata_prepare, _litdata(None)),
    Loader("litdata, drop_last=False", "litdata", LITDATA_SAYS, _litdata_prepare, _litdata(False)),
    Loader(
        "HF datasets in StatefulDataLoader",
        "datasets torchdata",
        "examples from shuffle buffers are lost when resuming (IterableDataset.state_dict)",
        _datasets_prepare,
        _datasets,
    ),
    Loader(
        "torch, StatefulDistributedSampler",
        "torchdata",
        "handles state across multiprocess workers (but not across ranks) (README of StatefulDataLoader)",
        lambda folder, pictures: None,
        _torchdata,
    ),
    Loader(
        "webdataset, skipping batches",
        "webdataset",
        "each sample exactly once per epoch is difficult ... it can't do it for you (author, issue 177)",
        _webdataset_prepare,
        _webdataset,
    ),
)
