"""deploy: a model version -> an HTTP endpoint."""

from contextlib import suppress

from prefect import flow, task
from prefect.artifacts import create_link_artifact

from diffusion.adapters import ray_serve
from diffusion.adapters.mlflow_registry import resolve
from diffusion.recipe import Frozen, ServeRecipe
from diffusion.serving.keys import read
from diffusion.store.refs import ModelRef
from flows.console import say, ticked, waiting
from flows.preflight import check_serving
from flows.site import Site, ray_running
from flows.stage import TASK

_DRAIN_S = 20.0  # what starts services gives them 30 s to end, where it gives least


class Endpoint(Frozen):
    """Where a model answers."""

    url: str
    model: ModelRef
    guarded: bool = False  # whether requests need a key; a field named `keys` would make Prefect take it for a dict


@flow(name="deploy")
def deploy(recipe: ServeRecipe, name: str = "demo", which: str = "champion", site: Site | None = None) -> Endpoint:
    """Serve a version of the model `name`.  which: an alias or a number; it is resolved now, not at each request."""
    site = site or Site.from_environment()
    site.prepare()
    check_serving(site)
    return deploy_stage(recipe, name, which, site)


@task(name="deploy", **TASK)
def deploy_stage(recipe: ServeRecipe, name: str, which: str, site: Site) -> Endpoint:
    model = resolve(site.tracking(name), name, which, site.store)
    with (
        ray_running(site),
        waiting("deploy    loading the model and proving that a picture does not depend on its batch"),
    ):
        url = ray_serve.deploy(
            model,
            recipe,
            host=site.host,
            port=site.port,
            replicas=site.replicas,
            gpus=site.replica_gpus if site.use_gpu else 0,
            idle_s=site.idle_s,
            access=site.access,
            log=site.logs / "requests.jsonl",
        )
    ticked(f"deploy    {name} version {model.version}")
    create_link_artifact(url, key="endpoint", description=f"{model.name} version {model.version}, {model.digest}")
    return Endpoint(url=url, model=model, guarded=site.access.needed or bool(read(site.access.keys)))


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
