"""A model that draws latents, after training: its pictures are decoded ones, wherever they are asked for, and it refuses
what another codec or only pixels could do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusion.data.images import decode_png, to_model, to_uint8
from diffusion.data.precompute import precompute
from diffusion.data.precomputed import computation_of
from diffusion.data.reader import ShardReader
from diffusion.edit import sdedit
from diffusion.evaluation.facts.held_out import held_out_loss
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.measure import evaluate
from diffusion.evaluation.plan import evenly
from diffusion.evaluation.report.report import load_report
from diffusion.guidance import conditioned
from diffusion.random import Stream, normal
from diffusion.recipe import EvaluateRecipe, Recipe, ShardRecipe
from diffusion.sampler import ddim, run
from diffusion.serving.engine import Engine
from diffusion.serving.job import condition, noise_of
from diffusion.serving.receipt import read_receipt
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.spacing import sampling_sigmas
from diffusion.store.bundle import Bundle, load_bundle, verify_bundle
from diffusion.store.refs import EvaluationRef, RunRef
from flows.cli import app
from flows.site import Site
from tests.evaluated_run import make_run
from tests.small_codec import CHANNELS, FACTOR, VARIABLE, drawing_latents, saved

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("latent")


@pytest.fixture(scope="module")
def folder(root) -> Path:
    return saved(root / "codec")


@pytest.fixture(autouse=True)
def _codec(folder, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, str(folder))


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Recipe:
    unet = tiny_recipe.train.unet.model_dump() | {"stem": 1}
    return tiny_recipe.model_copy(
        update={
            "shard": ShardRecipe(resolution=SIDE, shard_size=16, holdout=0.2),
            "train": drawing_latents(tiny_recipe.train, unet=unet),
            "evaluate": EvaluateRecipe(**dict(tiny_recipe.evaluate) | {"loss_levels": (0.5, 5.0)}),
        }
    )


@pytest.fixture(scope="module")
def trained(emoji_folder, recipe, root, folder) -> RunRef:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        return make_run(emoji_folder, recipe, root)


@pytest.fixture(scope="module")
def evaluated(trained, recipe, root, folder) -> EvaluationRef:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        return evaluate(trained, recipe.evaluate, root)


@pytest.fixture
def bundle(evaluated) -> Bundle:
    return load_bundle(evaluated.bundle_uri, digest=evaluated.bundle_digest)


def test_the_report_is_of_pictures_and_has_no_bound(evaluated, trained, recipe, root, bundle):
    report, said = load_report(evaluated.uri, evaluated.digest), Path(evaluated.uri, "report.md").read_text()
    assert report.codec == bundle.spec.codec
    assert report.frechet.identity.samples == 16
    assert report.bound is None
    assert "bound on these cannot be compared with one on pictures" in said
    assert f"| codec | {report.codec} |" in said
    assert verdict(report, None, recipe.gate.model_copy(update={"max_loss": 1e6})).passed
    assert np.array(Image.open(Path(evaluated.uri, "grid.png"))).shape[0] > 3 * SIDE
    # from sidecars, where there are any, the same report
    precompute(trained.dataset, computation_of(bundle.codec))
    assert evaluate(trained, recipe.evaluate, root) == evaluated


def test_the_held_out_loss_is_of_latents(evaluated, trained, recipe, bundle):
    reader = ShardReader(trained.dataset.uri, "holdout")
    chosen = [reader.read(i) for i in evenly(len(reader), recipe.evaluate.loss_pictures)]
    x = to_model(torch.from_numpy(np.stack([sample.image for sample in chosen])))
    mean, std = bundle.codec.encode(x).unbind(1)
    seed, numbers = recipe.evaluate.seed, torch.arange(len(x))
    x0 = mean + std * normal(seed, Stream.LATENT, numbers, tuple(mean.shape[1:]))
    cond = {"label": torch.tensor([sample.label for sample in chosen])}
    found = held_out_loss(bundle.denoiser, x0, cond, level=1, recipe=recipe.evaluate)
    assert load_report(evaluated.uri).held_out[1].loss == pytest.approx(found["loss"].mean(), rel=1e-4)


def test_a_picture_is_the_decoded_answer_and_has_the_bytes_that_it_has_alone(bundle):
    assert bundle.spec.shape_at() == (CHANNELS, SIDE // FACTOR, SIDE // FACTOR)
    engine = Engine(bundle, slots=4)
    probe = GenerateRequest(label=bundle.spec.classes[1], seed=7, sampler="ddim", guidance=1.0, steps=3)
    others = [GenerateRequest(label=bundle.spec.classes[0], n=3, seed=1), GenerateRequest(seed=2)]
    ((alone,),) = engine.generate([probe])
    among = engine.generate([*others, probe])[-1][0]
    assert (alone.shape, alone.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert np.array_equal(alone, among)
    assert engine.self_test()

    request = resolve(probe, bundle.spec)
    initial = noise_of(request, Stream.INITIAL, range(1), bundle, torch.device("cpu"))(0)
    sigmas = sampling_sigmas(bundle.spec.sampling, 3)
    cond = condition(bundle, request.label_index, None, 1, torch.device("cpu"))
    x0 = run(conditioned(ddim(initial * sigmas[0].float(), sigmas), cond), engine.denoise)
    assert np.array_equal(alone, to_uint8(bundle.codec.decode(x0))[0].numpy())


def test_without_its_codec_a_model_is_refused_when_it_is_loaded(evaluated, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert verify_bundle(evaluated.bundle_uri)[0].codec  # registering needs no codec
    with pytest.raises(ValueError, match=f"set {VARIABLE} to a folder"):
        load_bundle(evaluated.bundle_uri)
    monkeypatch.setenv(VARIABLE, str(saved(tmp_path / "changed", seed=1)))
    with pytest.raises(ValueError, match="it would make other pictures of the same latents"):
        load_bundle(evaluated.bundle_uri)


@pytest.fixture
def diffusion(monkeypatch, tmp_path, evaluated):
    """Runs a command with the model; its ValueError is the answer."""
    monkeypatch.setattr("flows.cli_pictures.guarded", lambda work, debug, **given: work(Site(home=tmp_path, gpu=False)))

    def command(*arguments: str) -> tuple[Path, str]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        given = [*arguments, "--bundle", evaluated.bundle_uri, "--steps", "3", "--out", str(out), "--seed", "5"]
        done = CliRunner().invoke(app, given)
        return out, str(done.exception) if done.exception else ""

    return command


@pytest.fixture
def picture(tmp_path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_sample_writes_decoded_pictures_with_receipts(diffusion, bundle):
    out, error = diffusion("sample", "--label", bundle.spec.classes[0], "--n", "2")
    assert error == ""
    files = sorted(out.glob("*-5-*.png"))
    drawn = Engine(bundle).generate([GenerateRequest(label=bundle.spec.classes[0], n=2, seed=5, steps=3)])[0]
    for file, expected in zip(files, drawn, strict=True):
        assert np.array_equal(decode_png(file.read_bytes()), expected)
        assert read_receipt(file.read_bytes()).bundle_digest == bundle.digest


def test_editing_goes_through_latents(diffusion, picture, bundle):
    out, error = diffusion("edit", str(picture), "--strength", "0.4", "--sampler", "ddim", "--guidance", "1")
    assert error == ""
    (file,) = out.glob("5-*.png")
    recipe = bundle.spec.sampling.model_copy(update={"sigma_min": 0.02})
    request = resolve(GenerateRequest(seed=5, steps=3), bundle.spec)
    noise = noise_of(request, Stream.INITIAL, range(1), bundle, torch.device("cpu"))(0)
    reference = bundle.codec.encode(to_model(torch.from_numpy(decode_png(picture.read_bytes())[None])))[:, 0]
    cond = condition(bundle, len(bundle.spec.classes), None, 1, torch.device("cpu"))
    asked = conditioned(sdedit(ddim, reference, noise, sampling_sigmas(recipe, 3), strength=0.4), cond)
    x0 = run(asked, Engine(bundle).denoise)
    assert np.array_equal(decode_png(file.read_bytes()), bundle.pictures(x0)[0].numpy())
    strip = decode_png((out / "strip.png").read_bytes())
    assert np.array_equal(strip[2 : 2 + SIDE, 2 : 2 + SIDE], decode_png(picture.read_bytes()))  # as it was given


def test_what_needs_pixels_is_refused_before_the_model_is_loaded(diffusion, picture, monkeypatch):
    monkeypatch.setattr("flows.pictures.load_bundle", None)
    assert (
        "restoration puts what is known of the pixels"
        in diffusion("restore", str(picture), "--task", "colorization")[1]
    )
    assert "mask: " in diffusion("edit", str(picture), "--mask", str(picture))[1]
    assert "coarse: " in diffusion("edit", str(picture), "--coarse", "8")[1]


def test_a_bundle_that_draws_pictures_says_nothing_of_a_codec(evaluated, bundle):
    spec = json.loads(Path(evaluated.bundle_uri, "bundle.json").read_text())
    assert spec["codec"] == bundle.spec.codec.model_dump()
    plain = bundle.spec.model_copy(update={"codec": None})
    assert "codec" not in plain.model_dump()
    assert plain.shape_at() == (3, SIDE, SIDE)
