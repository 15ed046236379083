"""Several models behind one address, over HTTP."""

import pytest

from diffusion.adapters.http import create_app
from diffusion.recipe import ServeRecipe
from diffusion.serving.held import Bundles
from diffusion.serving.lineup import Canary, Lineup
from diffusion.serving.receipt import read_receipt
from diffusion.serving.shelf import Shelf
from tests.integration.test_http import URL, answering, error_of
from tests.integration.test_http_reworks import PICTURE
from tests.random_bundle import published_model
from tests.test_shelf import damaged, until

LIMITS = ServeRecipe(slots=2, queue=8, timeout_s=60)


@pytest.fixture(scope="module")
def offered(one_thread, tmp_path_factory):
    """(shelf, client) of version 1, its canary 2, and version 9, which is broken and has no room at the start."""
    store = tmp_path_factory.mktemp("store")
    models = [published_model(store, seed=i, version=str(i + 1)) for i in range(2)]
    models.append(damaged(store, seed=5, version="9"))
    shelf = Shelf(Bundles(LIMITS), room=2 * Bundles(LIMITS).size(models[0]))
    shelf.change(Lineup(models=models, canaries=(Canary(version="2", share=0.5),)))
    with answering(create_app(shelf, LIMITS)) as client:
        yield shelf, client
    shelf.close()


def test_all_that_can_be_asked_for_is_listed_and_asked_for_by_that(offered) -> None:
    _, client = offered
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["name"], card["version"]) for card in cards] == [
        ("tiny", "tiny", "1"),
        ("tiny@2", "tiny", "2"),
        ("tiny@9", "tiny", "9"),
    ]
    for card in cards[1:2]:
        answer = client.post(URL, json={"model": card["id"], "label": "cat", "steps": 2, "response_format": "png"})
        assert read_receipt(answer.content).version == card["version"]
    unknown = client.post(URL, json={"model": "tiny@3", "label": "cat"})
    assert (unknown.status_code, error_of(unknown)["allowed"]) == (404, ["tiny", "tiny@2", "tiny@9"])


def test_the_same_request_gets_the_same_model_and_one_without_a_seed_can_be_asked_again(offered) -> None:
    _, client = offered
    body = {"label": "cat", "steps": 2}
    first = [client.post(URL, json=body).json() for _ in range(12)]
    assert {answer["version"] for answer in first} == {"1", "2"}
    again = [client.post(URL, json=body | {"seed": answer["seed"], "user": "me"}).json() for answer in first]
    assert [answer["data"] for answer in again] == [answer["data"] for answer in first]
    forms = [
        client.post("/v1/images/variations", files={"image": PICTURE}, data={"steps": "3", "seed": str(seed)}).json()
        for seed in (*range(6), *range(6))
    ]
    assert [each["version"] for each in forms[:6]] == [each["version"] for each in forms[6:]]
    assert {each["version"] for each in forms} == {"1", "2"}


def test_a_model_that_cannot_be_loaded_is_refused_and_nobody_else_is(offered) -> None:
    shelf, client = offered
    for _ in range(2):
        answer = client.post(URL, json={"model": "tiny@9", "label": "cat", "steps": 2})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
    assert client.post(URL, json={"label": "cat", "steps": 2}).status_code == 200
    health = client.get("/healthz").json()
    assert health["status"] == "ok"
    until(lambda: not any(held.holders for held in shelf.held()))
