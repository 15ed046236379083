"""Precomputing captions and latents on Ray Data: the same sidecars as in one process, made by actors that hold the encoder.

The data root, and the weights of an encoder or codec, must be at the same path on every node.
"""

from collections.abc import Iterator
from functools import partial

from diffusion.adapters.ray_actors import Work, on_actors
from diffusion.data.manifest import ShardEntry
from diffusion.data.precompute import Maker, Progress, Setup, precompute
from diffusion.data.precomputed import Computation
from diffusion.store.refs import DatasetRef


def precompute_dataset(dataset: DatasetRef, by: Computation, *, actors: int, progress: Progress | None = None) -> None:
    """`data.precompute.precompute` on the running Ray, with `actors` actors of one thread or one GPU each."""
    precompute(dataset, by, each=partial(_ray_each, actors=actors), progress=progress)


def _ray_each(setup: Setup, entries: list[ShardEntry], *, actors: int) -> Iterator[int]:
    tasks = [entry.model_dump_json() for entry in entries]
    gpus = int(setup.by.device == "cuda")
    rows = on_actors(
        _make, setup.model_dump_json(), tasks, {"pictures": 0}, actors=actors, gpus=gpus, what="a precomputation"
    )
    return (row["pictures"] for row in rows)


def _make(setup: str) -> Work:
    maker = Maker(Setup.model_validate_json(setup))
    return lambda task: {"pictures": maker(ShardEntry.model_validate_json(task))}
