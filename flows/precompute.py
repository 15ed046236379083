"""precompute: what the text encoder of a recipe makes of a dataset's captions, and its codec of the pictures."""

import time

from prefect import task

from diffusion.adapters.ray_precompute import precompute_dataset
from diffusion.data.precompute import missing
from diffusion.data.precomputed import Computation
from diffusion.recipe import TrainRecipe
from diffusion.store.codecs import identity_for
from diffusion.store.refs import DatasetRef
from diffusion.store.text_encoders import identity_of
from flows.console import progress, seconds, ticked
from flows.foreground import ending_soon
from flows.retries import TASK
from flows.site import Site, ray_running


def precomputed(recipe: TrainRecipe, dataset: DatasetRef, site: Site) -> None:
    """Have the sidecars that `recipe` can use and that are missing; nothing where it reads neither captions nor latents."""
    codec = identity_for(recipe)
    if codec:
        codec.side(dataset.resolution)
    for what, identity in (("captions", identity_of(recipe)), ("latents", codec)):
        if identity is None:
            continue
        by = Computation(encoder=identity, device="cuda" if site.use_gpu else "cpu")
        if missing(dataset, by):
            precompute_stage(what, by, dataset, site)


@task(name="precompute", **TASK)
def precompute_stage(what: str, by: Computation, dataset: DatasetRef, site: Site) -> None:
    """Make the sidecars of a dataset that are missing.  what: for people, captions or latents."""
    started = time.monotonic()
    with ending_soon(), ray_running(site), progress(what, "pictures") as update:
        precompute_dataset(dataset, by, actors=site.most_workers, progress=update)
    ticked(f"{what:<9} {seconds(time.monotonic() - started)}")
