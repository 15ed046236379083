"""A model version -> an HTTP endpoint, and its end.  Prefect, where it is to tell of it, comes in `flows.deploy`."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from diffusion.adapters import ray_serve
from diffusion.recipe import Frozen, ServeRecipe
from diffusion.serving.keys import read
from diffusion.serving.lineup import Lineup
from diffusion.store.refs import ModelRef
from flows.console import say, ticked, waiting
from flows.offer import Offer, looked_up, placed
from flows.site import Site, ray_running

_DRAIN_S = 20.0  # what starts services gives them 30 s to end, where it gives least


class Endpoint(Frozen):
    """Where a model answers."""

    url: str
    model: ModelRef
    guarded: bool = False  # whether requests need a key; a field named `keys` would make Prefect take it for a dict
    lineup: Lineup  # all that is offered
    digests: tuple[str, ...]  # what the offer's names meant
    slots: int | None = None  # pictures that a replica draws at once, as one of them has measured


def served(recipe: ServeRecipe, offer: Offer, site: Site) -> Endpoint:
    """Have the site's endpoint offer what these names mean now.  Raises DeployFailed, as `ray_serve.deploy` does."""
    with ThreadPoolExecutor(1) as beside:
        looking = beside.submit(looked_up, offer, site)  # takes seconds, as Ray's start does
        with ray_running(site):
            with waiting("deploy    looking up what is registered"):
                offered = looking.result()
            with waiting("deploy    loading the model and proving that a picture does not depend on its batch"):
                url = serve(recipe, offered.lineup, site)
            slots = ray_serve.slots(url)
    model = offered.lineup.present
    ticked(f"deploy    {model.name} version {model.version}")
    return Endpoint(
        url=url,
        model=model,
        guarded=site.access.needed or bool(read(site.access.keys)),
        lineup=offered.lineup,
        digests=offered.digests,
        slots=slots,
    )


def serve(recipe: ServeRecipe, lineup: Lineup, site: Site) -> str:
    """Have the site's endpoint offer this.  Returns its URL.  Raises DeployFailed, as `ray_serve.deploy` does."""
    with ray_running(site):
        return ray_serve.deploy(
            lineup.present,
            recipe,
            host=site.host,
            port=site.port,
            beside=lineup.models[1:],
            canaries=lineup.canaries,
            **placed(site),
        )


def taken_down(site: Site) -> None:
    """An endpoint on a Ray of our own, which ends with this program, answers first what it was asked."""
    if site.ray is not None:
        return
    with (
        suppress(KeyboardInterrupt),
        waiting(f"answering what was asked, {_DRAIN_S:g} s at most; Ctrl-C ends it at once"),
    ):
        if not ray_serve.drain(_DRAIN_S):
            say("  some requests were not answered in time, and are given up")
