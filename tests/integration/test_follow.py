"""An endpoint that follows an alias of a real registry, on a real Ray."""

import json
import urllib.request
from collections.abc import Iterator
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


def test_what_the_alias_means_is_served_and_what_is_broken_is_not(
    site, tracking, run, champion, tiny_recipe, capsys
) -> None:
    offer = Offer(name="smoke")
    lineup, digests = looked_up(offer, site)
    url = serve(RECIPE, lineup, site)
    follower = Follower(RECIPE, offer, site, Endpoint(url=url, model=champion, lineup=lineup, digests=digests))
    follower.look()
    assert (health(site)["version"], capsys.readouterr().out) == ("1", "")

    def promoted(steps: int, against: str) -> ModelRef:
        evaluation = evaluated(site.store, run, sampling(steps), 12.0 - steps)
        verdict = FIRST.model_copy(update={"against": against})
        return register(tracking, evaluation, verdict, "smoke", tiny_recipe.evaluate)

    second = promoted(4, against="1")
    follower.look()
    assert "version 2 is served now, instead of 1" in capsys.readouterr().out
    assert health(site)["bundle_digest"] == second.digest

    third = promoted(5, against="2")
    weights = bundle_path(site.store, third.digest) / "weights.safetensors"
    whole = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):  # it is told once
        follower.look()
    assert capsys.readouterr().out.count("sha256") == 1
    assert health(site)["version"] == "2"
    weights.write_bytes(whole)
    follower.look()
    assert (health(site)["version"], deployed().model.version) == ("3", "3")


def test_a_canary_is_what_its_alias_means_and_none_once_it_is_champion(site, client, champion) -> None:
    client.set_registered_model_alias("smoke", "champion", "1")
    client.set_registered_model_alias("smoke", "challenger", "2")
    lineup, digests = looked_up(ALSO, site)
    assert [model.version for model in lineup.models] == ["1", "2"]
    assert [(canary.version, canary.share) for canary in lineup.canaries] == [("2", 0.25)]
    assert len(digests) == 2
    serve(RECIPE, lineup, site)
    assert {each["version"] for each in health(site)["loaded"]} >= {"1", "2"}
    client.set_registered_model_alias("smoke", "champion", "2")
    lineup, _ = looked_up(ALSO, site)
    assert ([model.version for model in lineup.models], lineup.canaries) == (["2"], ())
    with pytest.raises(ValueError, match="no alias or version 'nobody'"):
        looked_up(Offer(name="smoke", beside=("smoke@nobody",)), site)
