"""The endpoint as an application of Ray Serve's configuration files, for a cluster that serves by itself.

`serve deploy` and KubeRay's RayService take a file with an import path and arguments:

    applications:
      - name: diffusion
        route_prefix: /
        import_path: flows.serve_app:app
        args: {name: demo, which: "3"}

Where it runs is said by the DIFFUSION_* variables of the cluster's nodes, which see the home.  `diffusion deploy` serves the
same application, and tells besides whether the new model was taken.
"""

from pydantic import Field
from ray.serve import Application

from diffusion.adapters.ray_serve import Deployed, application
from diffusion.recipe import ServeRecipe
from flows.offer import Offer, looked_up, placed
from flows.preflight import check_access
from flows.site import Site


class Served(Offer):
    """What is offered, by name, and within which limits.  Other keys are refused."""

    limits: ServeRecipe = Field(ServeRecipe(), description="The recipe's `serve`")


def app(served: Served) -> Application:
    """Look up what is offered and make the application of it.  An alias is what it means now: give a number to pin it.

    Raises ValueError for what is not registered, and for an endpoint beyond loopback that has no keys.
    """
    site = Site.from_environment()
    site.prepare()
    check_access(site)
    lineup = looked_up(served, site).lineup
    return application(Deployed(lineup=lineup, limits=served.limits, **placed(site)))
