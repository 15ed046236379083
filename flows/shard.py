"""shard: pictures -> a published dataset."""

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from diffusion.adapters.ray_data import shard_dataset
from diffusion.data.sources import open_source
from diffusion.recipe import ShardRecipe, TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.works import recall, work_key
from flows.console import progress
from flows.precompute import precompute_stage
from flows.site import Site, ray_running
from flows.stage import TASK, Done, once


@flow(name="shard")
def shard(
    recipe: ShardRecipe, source: str = "embedded", site: Site | None = None, train: TrainRecipe | None = None
) -> DatasetRef:
    """Cut a folder or .zip of pictures into shards.  site: None for the one the worker's environment describes.

    train: what will be trained on them; where it reads captions, they are computed as well.
    """
    site = site or Site.from_environment()
    site.prepare()
    dataset = shard_stage(recipe, source, site).ref
    if train:
        precompute_stage(train, dataset, site)
    return dataset


@task(name="shard", **TASK)
def shard_stage(recipe: ShardRecipe, source: str, site: Site) -> Done[DatasetRef]:
    def make() -> DatasetRef:
        with ray_running(site), progress("shard", "pictures") as update:
            return shard_dataset(source, recipe, site.store, progress=update)

    done = once("shard", _key(recipe, source), DatasetRef, site, make)
    create_table_artifact([facts(done.ref)], key="dataset", description=f"Dataset {done.ref.digest}")
    return done


def finished(recipe: ShardRecipe, source: str, site: Site) -> DatasetRef:
    """The dataset that `shard` made of this source.  Raises ValueError where it has not."""
    ref = recall(site.store, _key(recipe, source), DatasetRef)
    if ref is None:
        raise ValueError(
            f"source {source} is not sharded with this recipe yet: run `diffusion shard` with the same options"
        )
    return ref


def facts(ref: DatasetRef) -> dict[str, str | int]:
    """A dataset for people."""
    return {
        "pictures": ref.images,
        "held out": ref.holdout,
        "set aside": ref.rejected,
        "classes": len(ref.classes),
        "resolution": ref.resolution,
        "digest": ref.digest[:16],
        "folder": ref.uri,
    }


def _key(recipe: ShardRecipe, source: str) -> str:
    return work_key("shard", recipe, (open_source(source).fingerprint,))
