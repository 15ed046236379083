"""Following what aliases mean: a new champion is served where it was moved to, without anything being started anew."""

from diffusion.adapters.ray_serve import DeployFailed
from diffusion.recipe import ServeRecipe
from diffusion.serving.lineup import Key, Lineup
from flows.console import say
from flows.endpoint import Endpoint, serve
from flows.offer import Offer, digests, looked_up
from flows.site import Site


class Follower:
    """Of one endpoint."""

    def __init__(self, recipe: ServeRecipe, offer: Offer, site: Site, endpoint: Endpoint) -> None:
        self.recipe, self.offer, self.site = recipe, offer, site
        self._lineup, self._seen = endpoint.lineup, endpoint.digests
        self._told: str | None = None  # the trouble that was told last

    def look(self) -> None:
        """Serve what the aliases mean now, if that is something else, and say so.  What is refused is not tried again until
        they mean something else; while the registry does not answer what is served stays."""
        try:
            now = digests(self.offer, self.site)
            if now == self._seen:
                self._told = None
                return
            lineup, now = looked_up(self.offer, self.site)
            serve(self.recipe, lineup, self.site)
        except Exception as error:
            if isinstance(error, DeployFailed):
                self._seen = now
            kind = "" if isinstance(error, DeployFailed | ValueError) else f"{type(error).__name__}: "
            self._tell(f"  {kind}{str(error).strip() or 'no reason is known'}")
            return
        before, self._seen, self._lineup, self._told = self._lineup, now, lineup, None
        named = f"{lineup.present.name} version {lineup.present.version}"
        if lineup.present.version != before.present.version:
            say(f"  {named} is served now, instead of {before.present.version}")
        elif _offers(lineup) != _offers(before):
            say(f"  {named} is served as before, and all there is: {', '.join(lineup.names())}")

    def _tell(self, trouble: str) -> None:
        if trouble != self._told:
            say(trouble)
        self._told = trouble


def _offers(lineup: Lineup) -> tuple:
    return [Key.of(model) for model in lineup.models], lineup.canaries
