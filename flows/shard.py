"""shard: pictures -> a published dataset."""

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

from diffusion.data import datasets
from diffusion.data.report import PAGE, write_report
from diffusion.data.sources import open_source
from diffusion.data.versions import settled
from diffusion.recipe import ShardRecipe, TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import open_storage
from diffusion.store.works import work_key
from flows.artifact import with_pictures
from flows.console import progress
from flows.precompute import precomputed
from flows.preflight import check_encoders
from flows.retries import TASK
from flows.site import Site, ray_running
from flows.stage import Done, once


@flow(name="shard")
def shard(
    recipe: ShardRecipe,
    source: str = "embedded",
    site: Site | None = None,
    train: TrainRecipe | None = None,
    fresh: bool = False,
) -> DatasetRef:
    """Cut pictures into shards.  A source that has changed since it was last sharded gives a new version of its dataset.

    site: None for the one the worker's environment describes.  train: what will be trained on them; where it reads captions,
    they are computed as well.  fresh: read every file, and go on from no version.
    """
    site = site or Site.from_environment()
    site.prepare()
    if train:
        check_encoders(train)
    dataset = shard_stage(recipe, source, site, fresh).ref
    if train:
        precomputed(train, dataset, site)
    return dataset


@task(name="shard", **TASK)
def shard_stage(recipe: ShardRecipe, source: str, site: Site, fresh: bool = False) -> Done[DatasetRef]:
    opened, root = open_source(source, columns=recipe.columns), open_storage(site.data_root)

    def make() -> DatasetRef:
        from diffusion.adapters.ray_data import shard_dataset  # Ray is not loaded where there is nothing to do

        with ray_running(site), progress("shard", "pictures") as update:
            return shard_dataset(source, recipe, root, site.home / "work", fresh=fresh, progress=update)

    def now(_: DatasetRef) -> DatasetRef | None:
        # people may have released files since, which gave a newer version of the same state
        return None if fresh else settled(root, opened.uri, recipe, opened.fingerprint)

    key = work_key("shard", recipe, (opened.fingerprint, opened.uri, root.uri))
    same = "the same pictures, the same recipe"
    done = once("shard", key, DatasetRef, site, make, now=now, same=same, place=site.data_root)
    datasets.set_latest(root, done.ref.digest)
    if open_storage(done.ref.uri).size(PAGE) is None:
        write_report(datasets.opened(done.ref.uri))
    page = with_pictures(done.ref.uri, PAGE)
    create_markdown_artifact(page, key="dataset", description=f"Dataset {done.ref.digest}")
    return done
