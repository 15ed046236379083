"""A bundle with a guide in the engine: two networks, one tick, and a picture is still a function of its request alone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffusion.data.images import decode_png, to_uint8
from diffusion.guidance import Guidance
from diffusion.random import Stream, normal
from diffusion.recipe import ServeRecipe
from diffusion.sampler import SAMPLERS, run
from diffusion.schedule import karras_sigmas
from diffusion.serving.engine import Engine
from diffusion.serving.ladder import NotReproducible
from diffusion.serving.receipt import read_receipt, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, RequestError, resolve
from diffusion.store.bundle import Bundle, load_bundle
from flows.cli import app
from flows.site import Site
from tests.random_bundle import CLASSES, RESOLUTION, guided_bundle, published_model, random_bundle
from tests.running_engine import shelved

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = [
    GenerateRequest(label="cat", seed=1, n=3),
    GenerateRequest(label="cat", seed=1, n=2, guidance=20, guidance_kind="classifier_free"),
    GenerateRequest(seed=2, n=2),
    GenerateRequest(seed=2, guidance_kind="classifier_free"),
    GenerateRequest(label="dog", seed=3, guidance=1),
    GenerateRequest(label="dog", seed=4, sampler="dpmpp_2m", steps=4, guidance=3.5),
    GenerateRequest(label="cat", seed=5, n=3, sampler="ddpm", steps=6),
    GenerateRequest(label=CLASSES[2], seed=6, sampler="unipc", steps=3, guidance=0, guidance_kind="classifier_free"),
]


class Heard(torch.nn.Module):
    """A denoiser that notes the rows of its calls."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.rows, self.columns = inner, [], set()

    def forward(self, x, sigma, **cond):
        self.rows.append(len(x))
        self.columns |= set(cond)
        return self.inner(x, sigma, **cond)


def with_sampling(bundle: Bundle, **changed) -> Bundle:
    sampling = bundle.spec.sampling.model_copy(update=changed)
    return replace(bundle, spec=bundle.spec.model_copy(update={"sampling": sampling}))


def same(left, right) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(guided_bundle("fp32"), slots=4)


# In the engine


@pytest.mark.parametrize(("precision", "rescale"), [("bf16", 0.0), ("fp32", 0.7)])
def test_pictures_are_the_same_alone_and_among_others(precision, rescale):
    """Whichever network answers their rows, and on however large a server."""
    bundle = with_sampling(guided_bundle(precision), guidance_rescale=rescale)
    engine = Engine(bundle, slots=5)
    alone = [engine.generate([request])[0] for request in MIXED]
    assert len({picture.tobytes() for pictures in alone for picture in pictures}) == sum(r.n for r in MIXED)
    for drawer, seed in ((engine, 0), (engine, 1), (Engine(bundle, slots=16), 2)):
        order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        for i, pictures in zip(order, drawer.generate([MIXED[i] for i in order]), strict=True):
            assert same(pictures, alone[i])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("index", range(len(MIXED)))
def test_pictures_are_those_of_the_plain_sampler(index, rescale):
    """An independent slow version: both networks asked in turn, without columns, ladder or engine."""
    bundle, request = with_sampling(guided_bundle("fp32"), guidance_rescale=rescale), MIXED[index]
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(request.steps or recipe.steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    scale = recipe.guidance if request.guidance is None else request.guidance
    null = torch.tensor([len(CLASSES)])
    label = null if request.label is None else torch.tensor([CLASSES.index(request.label)])
    free = request.guidance_kind == "classifier_free"

    def denoise(x, sigma):
        wanted = bundle.denoiser(x, sigma, label)
        worse = bundle.denoiser(x, sigma, null) if free else bundle.guide(x, sigma, label)
        return wanted if scale == 1 else Guidance(scale, rescale=rescale).combine(wanted, worse)

    for i, picture in enumerate(Engine(bundle, slots=8).generate([request])[0]):
        shape = (3, RESOLUTION, RESOLUTION)
        x = normal(request.seed, Stream.INITIAL, torch.tensor([i]), shape) * recipe.sigma_max
        fresh = [normal(request.seed, Stream.CHURN, torch.tensor([(step << 32) + i]), shape) for step in range(10)]
        conversation = SAMPLERS[request.sampler or recipe.sampler](x, sigmas, fresh.__getitem__)
        expected = to_uint8(run(conversation, denoise))[0].numpy()
        # the batch sizes differ, so the last bits do, which may tip a pixel over a rounding
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_rescaling_changes_the_picture_of_a_guided_request_alone():
    plain, rescaled = (Engine(with_sampling(guided_bundle(), guidance_rescale=r), slots=4) for r in (0.0, 0.7))
    for request in (MIXED[0], MIXED[1], MIXED[4]):
        left, right = (drawer.generate([request])[0] for drawer in (plain, rescaled))
        assert same(left, right) == (request.guidance == 1)


def test_a_guide_changes_nothing_for_those_who_do_not_ask_it():
    requests = [
        GenerateRequest(label="cat", seed=1, n=3),
        GenerateRequest(seed=2),
        GenerateRequest(label="dog", seed=3),
    ]
    beside = Engine(guided_bundle(kind="classifier_free"), slots=4).generate(requests)
    for left, right in zip(beside, Engine(random_bundle(), slots=4).generate(requests), strict=True):
        assert same(left, right)


def test_each_network_is_asked_once_a_tick_for_the_rows_of_all_requests():
    bundle = guided_bundle("fp32")
    model, guide = Heard(bundle.denoiser), Heard(bundle.guide)
    engine = Engine(replace(bundle, denoiser=model, guide=guide), slots=6)
    assert guide.rows  # proven at load, in sizes of its own
    for heard in (model, guide):
        heard.rows.clear()
    requests = [GenerateRequest(label=label, seed=0, steps=2) for label in ("cat", "dog", None)]
    unguided = GenerateRequest(label="cat", seed=1, n=2, steps=2, guidance=1)
    engine.generate([*requests, unguided])
    # 3 guided pictures, which is no proven size, and 2 unguided ones; two steps of Heun's are three evaluations
    assert model.rows == engine.ladder.plan(5) * 3
    assert guide.rows == engine.networks.ladder_of(guide, engine.bundle.spec.size).plan(3) * 3
    assert model.columns == guide.columns == {"label"}


def test_a_guide_that_never_repeats_itself_is_refused_at_load():
    bundle, calls = guided_bundle(), iter(range(10**6))

    class Wandering(Heard):
        def forward(self, x, sigma, **cond):
            return super().forward(x, sigma, **cond) + next(calls)

    with pytest.raises(NotReproducible):
        Engine(replace(bundle, guide=Wandering(bundle.guide)), slots=2)


def test_the_self_test_is_of_both_networks(engine):
    other = Engine(replace(engine.bundle, guide=engine.bundle.denoiser), slots=4)
    assert engine.self_test() != other.self_test()


# Requests and receipts


def test_a_request_says_what_it_is_guided_away_from_or_the_model_does(engine):
    spec = engine.bundle.spec
    kinds = [resolve(request, spec).guidance_kind for request in MIXED[:2]]
    assert kinds == ["autoguidance", "classifier_free"]
    assert resolve(GenerateRequest(label="cat"), random_bundle().spec).guidance_kind == "classifier_free"


def test_autoguidance_strengthens_also_what_has_no_class(engine):
    """Both networks are asked for the same, so there is always a difference; classifier-free there is none."""
    spec = engine.bundle.spec
    assert resolve(GenerateRequest(guidance=3), spec).guided
    assert not resolve(GenerateRequest(guidance=1), spec).guided
    assert not resolve(GenerateRequest(guidance_kind="classifier_free"), spec).guided
    with pytest.raises(RequestError, match="guidance strengthens a class"):
        resolve(GenerateRequest(guidance=3, guidance_kind="classifier_free"), spec)


def test_a_model_without_a_guide_refuses_autoguidance_by_name():
    with pytest.raises(RequestError, match=r"guidance_kind=autoguidance: .*evaluate\.guide_images") as caught:
        resolve(GenerateRequest(label="cat", guidance_kind="autoguidance"), random_bundle().spec)
    assert (caught.value.param, caught.value.allowed) == ("guidance_kind", ["classifier_free"])


def test_a_receipt_states_autoguidance_and_one_without_is_as_it_always_was(engine):
    made_by = {"bundle_digest": engine.bundle.digest, "model": "tiny", "version": "1"}
    picture = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    said, unsaid = (
        receipt_of(picture, 0, resolve(request, engine.bundle.spec), engine.bundle.spec, **made_by)
        for request in MIXED[:2]
    )
    assert read_receipt(stamp(picture, said)).guidance_kind == "autoguidance"
    assert read_receipt(stamp(picture, unsaid)).guidance_kind == "classifier_free"
    assert "guidance_kind" not in unsaid.model_dump()


# Around the engine


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(published_model(tmp_path_factory.mktemp("store"), bundle=guided_bundle()).uri)


def test_a_published_bundle_draws_as_the_one_in_memory(published):
    loaded, memory = (Engine(bundle, slots=4) for bundle in (load_bundle(published), guided_bundle()))
    assert same(loaded.generate(MIXED[:1])[0], memory.generate(MIXED[:1])[0])


@pytest.mark.parametrize("command", ["sample", "restore", "edit"])
def test_every_command_is_guided_by_the_guide(published, tmp_path, monkeypatch, command):
    """The guided picture differs from the unguided one, and `sample` writes what the engine draws."""
    monkeypatch.setattr("flows.cli_pictures.guarded", lambda work, debug, **given: work(Site(home=tmp_path, gpu=False)))
    engine = Engine(load_bundle(published), slots=4)
    wanted = GenerateRequest(label="cat", seed=5, steps=3, guidance=3)
    picture = tmp_path / "picture.png"
    picture.write_bytes(stamp(engine.generate([wanted])[0][0], receipt(engine, wanted)))
    about = {
        "sample": ["sample", "--n", "1"],
        "restore": ["restore", str(picture), "--task", "super-resolution", "--factor", "2"],
        "edit": ["edit", str(picture), "--strength", "0.9"],
    }[command]
    drawn = []
    for guidance in ("3", "1"):
        out = tmp_path / guidance
        options = ["--label", "cat", "--seed", "5", "--steps", "3", "--guidance", guidance]
        done = CliRunner().invoke(app, [*about, "--bundle", str(published), "--out", str(out), *options])
        assert done.exit_code == 0, done.exception
        (file,) = [path for path in out.iterdir() if "5-000" in path.name]
        drawn.append(decode_png(file.read_bytes()))
    assert not np.array_equal(*drawn)
    if command == "sample":
        assert np.array_equal(drawn[0], engine.generate([wanted])[0][0])


def receipt(engine: Engine, request: GenerateRequest):
    resolved = resolve(request, engine.bundle.spec)
    picture = engine.generate([request])[0][0]
    return receipt_of(picture, 0, resolved, engine.bundle.spec, bundle_digest="9" * 64, model="tiny", version="1")


def test_the_command_line_chooses_and_refuses(published, tmp_path, monkeypatch):
    monkeypatch.setattr("flows.cli_pictures.guarded", lambda work, debug, **given: work(Site(home=tmp_path, gpu=False)))
    common = ["sample", "--label", "cat", "--n", "1", "--steps", "2", "--seed", "5", "--out"]
    done = CliRunner().invoke(
        app, [*common, str(tmp_path / "a"), "--bundle", str(published), "--guidance-kind", "classifier_free"]
    )
    assert done.exit_code == 0, done.exception
    assert read_receipt((tmp_path / "a" / "cat-5-000.png").read_bytes()).guidance_kind == "classifier_free"
    alone = Path(published_model(tmp_path / "store").uri)
    for bundle, kind, says in ((alone, "autoguidance", "no worse model"), (alone, "cfg", "autoguidance")):
        done = CliRunner().invoke(app, [*common, str(tmp_path / "b"), "--bundle", str(bundle), "--guidance-kind", kind])
        assert says in str(done.exception)


def test_the_endpoint_says_what_there_is_and_draws_with_it(engine):
    from fastapi.testclient import TestClient

    from diffusion.adapters.http import create_app
    from diffusion.store.refs import ModelRef

    model = ModelRef(
        uri="memory",
        digest="9" * 64,
        name="tiny",
        version="1",
        aliases=(),
        run_digest="1" * 64,
        dataset_digest="2" * 64,
    )
    with shelved(engine, model) as shelf:
        client = TestClient(create_app(shelf, ServeRecipe()), base_url="http://127.0.0.1")
        card = client.get("/v1/models").json()["data"][0]
        assert card["guidance_kinds"] == ["classifier_free", "autoguidance"]
        assert card["defaults"]["guidance_kind"] == "autoguidance"
        asked = {"label": "cat", "seed": 5, "steps": 3, "response_format": "png"}
        drawn = {}
        for kind in ("classifier_free", "autoguidance", None):
            body = asked | ({"guidance_kind": kind} if kind else {})
            answer = client.post("/v1/images/generations", json=body)
            assert answer.status_code == 200
            drawn[kind] = answer.content
    assert read_receipt(drawn[None]).guidance_kind == "autoguidance"
    assert drawn[None] == drawn["autoguidance"] != drawn["classifier_free"]
    expected = engine.generate([GenerateRequest(label="cat", seed=5, steps=3)])[0][0]
    assert np.array_equal(decode_png(drawn[None]), expected)


def test_the_registrys_model_takes_the_kind_as_a_parameter(published):
    from types import SimpleNamespace

    import pandas as pd

    from diffusion.adapters.mlflow_model import signature_of
    from diffusion.adapters.pyfunc_model import DiffusionModel

    model = DiffusionModel()
    model.load_context(SimpleNamespace(artifacts={"bundle": str(published)}))
    names = [parameter.name for parameter in signature_of(model.engine.bundle.spec).params]
    assert names == ["steps", "sampler", "guidance", "guidance_kind"]
    assert "guidance_kind" not in [p.name for p in signature_of(random_bundle().spec).params]
    rows = pd.DataFrame({"label": ["cat", None], "seed": [1, 2]})
    for kind, guidance in (("autoguidance", [3.0, 3.0]), ("classifier_free", [3.0, 1.0])):
        answer = model.predict(None, rows, {"steps": 2, "guidance": 3.0, "guidance_kind": kind})
        said = [json.loads(receipt) for receipt in answer["receipt"]]
        assert [r.get("guidance_kind", "classifier_free") for r in said] == [kind] * 2
        assert [r["guidance"] for r in said] == guidance
