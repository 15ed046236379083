"""What an endpoint is to offer, in names: a model by alias or version, its canaries, others beside it."""

from typing import NamedTuple

from pydantic import Field, ValidationError, field_validator

from diffusion.adapters.mlflow_registry import look_up, resolve
from diffusion.recipe import Frozen, mistake
from diffusion.serving.lineup import Canary, Lineup
from diffusion.store.refs import ModelRef
from flows.site import Site


class Offer(Frozen):
    """name, which: of the model that is meant where none is named.  Aliases are what they mean when they are looked up."""

    name: str
    which: str = "champion"
    shares: tuple[tuple[str, float], ...] = Field((), description="Alias or version -> share of the requests")
    beside: tuple[str, ...] = Field((), description="NAME, NAME@ALIAS or NAME@VERSION")

    @field_validator("beside", mode="before")
    @classmethod
    def _whole(cls, beside: list[str]) -> tuple[str, ...]:
        return tuple(each if "@" in each else f"{each}@champion" for each in beside)

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """(name, alias or version) of each, in the order of the lineup."""
        own = [(self.name, self.which), *((self.name, which) for which, _ in self.shares)]
        return (*own, *(tuple(each.split("@", 1)) for each in self.beside))


class Offered(NamedTuple):
    """An offer, looked up."""

    lineup: Lineup
    digests: tuple[str, ...]  # of each name's bundle


def placed(site: Site) -> dict:
    """What the site says of `ray_serve.Deployed`: replicas, their devices and memory, who may ask, files."""
    return {
        "replicas": site.replicas,
        "gpus": site.replica_gpus if site.use_gpu else 0,
        "idle_s": site.idle_s,
        "access": site.access,
        "log": site.logs / "requests.jsonl",
        "models_mib": site.models_mib,
        "notes": site.home / "self-tests",
    }


def shares_of(options: list[str]) -> tuple[tuple[str, float], ...]:
    """Of `--canary WHICH=SHARE`.  Raises ValueError."""
    found = []
    for option in options:
        which, _, share = option.partition("=")
        try:
            canary = Canary(version=which, share=float(share))
        except ValueError:
            raise ValueError(
                f"--canary {option}: give an alias or version and a share above 0 and below 1, as challenger=0.1"
            ) from None
        found.append((canary.version, canary.share))
    return tuple(found)


def digests(offer: Offer, site: Site) -> tuple[str, ...]:
    """What each name means now, without fetching a bundle."""
    return tuple(look_up(site.tracking(name), name, which, site.store)[0] for name, which in offer.names)


def looked_up(offer: Offer, site: Site) -> Offered:
    """What the names mean now, their bundles in the store.  A canary that has become the present version is none.

    Raises ValueError for what is not registered, or contradicts itself.
    """
    found = [resolve(site.tracking(name), name, which, site.store) for name, which in offer.names]
    models: dict[tuple[str, str], ModelRef] = {}
    for model in found:
        models.setdefault((model.name, model.version), model)
    shares = zip(found[1:], offer.shares, strict=False)
    canaries = [
        Canary(version=model.version, share=share) for model, (_, share) in shares if model.version != found[0].version
    ]
    try:
        lineup = Lineup(models=tuple(models.values()), canaries=tuple(canaries))
    except ValidationError as error:
        raise ValueError(mistake(error.errors()[0])) from None
    return Offered(lineup, tuple(model.digest for model in found))
