"""An endpoint that follows an alias of a real registry, on a real Ray."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusion.adapters.mlflow_registry import register
from diffusion.adapters.ray_serve import deployed, undeploy
from diffusion.recipe import ServeRecipe
from diffusion.store.bundle_spec import bundle_path
from diffusion.store.refs import ModelRef
from flows.endpoint import Endpoint, serve
from flows.follow import Follower
from flows.offer import Offer, looked_up
from flows.site import Site
from tests.ports import free_port
from tests.registered_run import FIRST, evaluated, sampling

RECIPE = ServeRecipe(slots=2, queue=8)
ALSO = Offer(name="smoke", which="champion", shares=(("challenger", 0.25),))


@pytest.fixture(scope="module")
def site(home: Path, ray_local) -> Iterator[Site]:
    yield Site(home=home, port=free_port(), models_mib=512)
    undeploy()


def health(site: Site) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{site.port}/healthz", timeout=30) as answer:
        return json.load(answer)


@pytest.fixture
def promoted(site, tracking, run, client, champion, tiny_recipe) -> Callable[[int], ModelRef]:
    """Registers what is drawn in so many steps, and makes it champion."""

    def promote(steps: int) -> ModelRef:
        before = str(client.get_model_version_by_alias("smoke", "champion").version)
        evaluation = evaluated(site.store, run, sampling(steps), 12.0 - steps)
        return register(
            tracking, evaluation, FIRST.model_copy(update={"against": before}), "smoke", tiny_recipe.evaluate
        )

    return promote


def test_what_the_alias_means_is_served_and_what_is_broken_is_not(site, client, champion, promoted, capsys) -> None:
    client.set_registered_model_alias("smoke", "champion", champion.version)
    offer = Offer(name="smoke")
    lineup, digests = looked_up(offer, site)
    url = serve(RECIPE, lineup, site)
    follower = Follower(RECIPE, offer, site, Endpoint(url=url, model=champion, lineup=lineup, digests=digests))
    follower.look()
    assert (health(site)["version"], capsys.readouterr().out) == (champion.version, "")

    second = promoted(4)
    follower.look()
    assert f"version {second.version} is served now, instead of {champion.version}" in capsys.readouterr().out
    assert health(site)["bundle_digest"] == second.digest

    third = promoted(5)
    weights = bundle_path(site.store, third.digest) / "weights.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):  # it is told once
        follower.look()
    assert capsys.readouterr().out.count("sha256") == 1
    assert health(site)["version"] == second.version
    weights.write_bytes(whole)
    follower.look()
    assert (health(site)["version"], deployed().model.version) == (third.version, third.version)


def test_a_canary_is_what_its_alias_means_and_none_once_it_is_champion(site, client, champion, promoted) -> None:
    other = promoted(6).version
    client.set_registered_model_alias("smoke", "champion", champion.version)
    client.set_registered_model_alias("smoke", "challenger", other)
    lineup, digests = looked_up(ALSO, site)
    assert [model.version for model in lineup.models] == [champion.version, other]
    assert [(canary.version, canary.share) for canary in lineup.canaries] == [(other, 0.25)]
    assert len(digests) == 2
    serve(RECIPE, lineup, site)
    assert {each["version"] for each in health(site)["loaded"]} >= {champion.version, other}
    client.set_registered_model_alias("smoke", "champion", other)
    lineup, _ = looked_up(ALSO, site)
    assert ([model.version for model in lineup.models], lineup.canaries) == ([other], ())
    with pytest.raises(ValueError, match="no alias or version 'nobody'"):
        looked_up(Offer(name="smoke", beside=("smoke@nobody",)), site)
