"""deploy: what of `flows.endpoint` Prefect tells."""

from prefect import flow, task
from prefect.artifacts import create_link_artifact

from diffusion.recipe import ServeRecipe
from flows.endpoint import Endpoint, served
from flows.offer import Offer
from flows.preflight import check_serving
from flows.retries import TASK
from flows.site import Site


@flow(name="deploy")
def deploy(
    recipe: ServeRecipe,
    name: str = "demo",
    which: str = "champion",
    site: Site | None = None,
    shares: tuple[tuple[str, float], ...] = (),
    beside: tuple[str, ...] = (),
) -> Endpoint:
    """Serve a version of the model `name`.  which: an alias or a number; it is resolved now, not at each request.

    shares: aliases or numbers of its canaries, each with its share of the requests.  beside: other models, as NAME@ALIAS.
    """
    site = site or Site.from_environment()
    site.prepare()
    check_serving(site)
    return deploy_stage(recipe, Offer(name=name, which=which, shares=shares, beside=beside), site)


@task(name="deploy", **TASK)
def deploy_stage(recipe: ServeRecipe, offer: Offer, site: Site) -> Endpoint:
    endpoint = served(recipe, offer, site)
    model = endpoint.model
    create_link_artifact(
        endpoint.url, key="endpoint", description=f"{model.name} version {model.version}, {model.digest}"
    )
    return endpoint
