"""precompute: what the recipe's text encoder makes of a dataset's captions, beside its shards."""

import time

from prefect import task

from diffusion.adapters.ray_precompute import precompute_dataset
from diffusion.data.precompute import missing
from diffusion.data.sidecar import Computation
from diffusion.recipe import TrainRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.text_encoders import text_identity
from flows.console import progress, seconds, ticked
from flows.foreground import ending_soon
from flows.site import Site, ray_running
from flows.stage import TASK


def precomputed(recipe: TrainRecipe, dataset: DatasetRef, site: Site) -> None:
    """Have the sidecars that `recipe` can use and that are missing; nothing where it reads no captions."""
    if recipe.text_encoder == "none":
        return
    identity = text_identity(recipe.text_encoder, tokens=recipe.text_tokens)
    by = Computation(encoder=identity, device="cuda" if site.use_gpu else "cpu")
    if missing(dataset, by):
        precompute_stage(by, dataset, site)


@task(name="precompute", **TASK)
def precompute_stage(by: Computation, dataset: DatasetRef, site: Site) -> None:
    """Make the sidecars of a dataset that are missing."""
    started = time.monotonic()
    with ending_soon(), ray_running(site), progress("captions", "pictures") as update:
        precompute_dataset(dataset, by, actors=site.train_workers, progress=update)
    ticked(f"captions  {seconds(time.monotonic() - started)}")
