"""store/averages.py: an average the run kept is read, one it did not keep is put together, and nothing else gets in."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion.ema import PowerEMA, Snapshot, combine
from diffusion.recipe import EvaluateRecipe, Recipe, TrainRecipe, canonical_json, checkpoints_of, digest_of
from diffusion.store.averages import MAX_ERROR, Manifest, check_averages, read_average, wanted_by
from diffusion.store.publish import sha256_file
from diffusion.store.refs import RunRef
from flows.preflight import check
from flows.site import Site
from tests.made_run import make_run

MOMENTS = tuple(range(8, 65, 8))
TRUE = (0.07, 0.12)  # kept by a run that is the same but for this


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> TrainRecipe:
    return tiny_recipe.train.model_copy(update={"ema": (0.05, 0.1), "images": 64, "checkpoint_images": 8})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: TrainRecipe) -> RunRef:
    """Eight steps and as many checkpoints."""
    return make_run(tmp_path_factory.mktemp("run"), recipe, steps=8)


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory, recipe: TrainRecipe) -> Path:
    """The same run, with the averages that the other did not keep: its last checkpoint."""
    kept = recipe.model_copy(update={"ema": TRUE, "checkpoint_images": 64})
    return Path(make_run(tmp_path_factory.mktemp("true"), kept, steps=8).uri)


@pytest.fixture
def run_copy(run: RunRef, tmp_path: Path) -> RunRef:
    folder = shutil.copytree(Path(run.uri).parent, tmp_path / "checkpoints")
    return run.model_copy(update={"uri": str(folder / Path(run.uri).name)})


def folder_at(run: RunRef, images_seen: int) -> Path:
    return Path(run.uri).with_name(f"{images_seen:012d}")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return sum((a[name] - b[name]).square().sum().item() for name in a) ** 0.5


@pytest.mark.parametrize("width", TRUE)
def test_an_average_that_was_never_kept_comes_from_the_checkpoints(run, true, width):
    """Against the average itself, kept by a run that is the same."""
    average = read_average(run, Snapshot(64, width))
    expected = load_file(true / f"ema-{width}.safetensors")
    nearest = min(distance(load_file(Path(run.uri, f"ema-{kept}.safetensors")), expected) for kept in (0.05, 0.1))
    assert distance(average.weights, expected) < 0.25 * nearest
    assert 0 < average.reconstruction.error < MAX_ERROR
    assert [source.images_seen for source in average.reconstruction.checkpoints] == list(MOMENTS)
    for source in average.reconstruction.checkpoints:
        assert source.digest == sha256_file(folder_at(run, source.images_seen) / "manifest.json")
    assert average.checkpoint == average.reconstruction.checkpoints[-1]


def test_what_was_kept_is_read_and_needs_no_other_checkpoint(run_copy):
    for moment in MOMENTS[:-1]:
        shutil.rmtree(folder_at(run_copy, moment))
    average = read_average(run_copy, Snapshot(64, 0.1))
    kept = load_file(Path(run_copy.uri, "ema-0.1.safetensors"))
    assert average.reconstruction is None
    assert average.checkpoint.digest == run_copy.digest
    assert all(torch.equal(average.weights[name], kept[name]) for name in kept)


def test_an_earlier_moment_knows_nothing_of_later_ones(run, run_copy):
    kept = read_average(run, Snapshot(24, 0.05))
    assert kept.reconstruction is None
    assert distance(kept.weights, load_file(folder_at(run, 24) / "ema-0.05.safetensors")) == 0
    before = read_average(run, Snapshot(48, 0.07))
    assert [source.images_seen for source in before.reconstruction.checkpoints] == list(MOMENTS[:6])
    shutil.rmtree(folder_at(run_copy, 56))
    assert distance(read_average(run_copy, Snapshot(48, 0.07)).weights, before.weights) == 0


def test_a_width_far_from_those_kept_is_refused_with_what_to_do(run, recipe):
    says = r"width 0\.27 cannot be .* 0\.05, 0\.1 that the run keeps at 8, 16, .*at most 10%.*checkpoint_images=2\)"
    with pytest.raises(ValueError, match=says):
        read_average(run, Snapshot(64, 0.27))
    with pytest.raises(ValueError, match=says):
        check_averages(recipe, Snapshot(64, 0.27))


@pytest.mark.parametrize("setting", [{"ema": 0.27}, {"guide_images": 32, "guide_ema": 0.27}])
def test_it_is_refused_before_anything_is_done(tiny_recipe, emoji_folder, tmp_path, setting):
    evaluate = EvaluateRecipe(**dict(tiny_recipe.evaluate) | setting)
    site = Site(home=tmp_path, gpu=False)
    check(tiny_recipe, str(emoji_folder), "register", site)
    with pytest.raises(ValueError, match=r"relative width 0\.27 cannot be put together"):
        check(tiny_recipe.model_copy(update={"evaluate": evaluate}), str(emoji_folder), "register", site)


@pytest.mark.parametrize("width", [0.03, 0.04, 0.07, 0.12, 0.15])
def test_what_is_accepted_of_the_demos_run_is_nearer_than_what_it_keeps(width):
    """Weights that descend to their place with noise, and come to rest, for as many steps as the demo's."""
    recipe, net, rng = TrainRecipe(), torch.nn.Linear(64, 1, bias=False), torch.Generator().manual_seed(0)
    steps = checkpoints_of(recipe)[-1] // recipe.batch_size
    ema, weights, stored = PowerEMA(net, (*recipe.ema, width)), torch.full((64,), 2.0), {}
    for step in range(1, steps + 1):
        rate = 0.05 * math.cos(math.pi * step / steps / 2) ** 2
        weights = weights - rate * (weights + torch.randn(64, generator=rng))
        with torch.no_grad():
            net.weight.copy_(weights[None])
        moment = step * recipe.batch_size
        ema.update(net, moment, recipe.batch_size)
        if moment in checkpoints_of(recipe):
            stored |= {Snapshot(moment, s): {"weight": ema.state_dict(s)["weight"].clone()} for s in recipe.ema}
    kept, coefficients, error = check_averages(recipe, Snapshot(moment, width))
    assert error < MAX_ERROR
    made = combine((stored[snapshot] for snapshot in kept), coefficients)
    expected = ema.state_dict(width)
    assert distance(made, expected) < 0.8 * min(distance(ema.state_dict(s), expected) for s in recipe.ema)


def test_two_widths_and_more_checkpoints_make_it_better():
    """As the error says."""

    def error(ema: tuple[float, ...], checkpoint_images: int) -> float:
        recipe = TrainRecipe(ema=ema, checkpoint_images=checkpoint_images)
        return check_averages(recipe, Snapshot(33_024, 0.11))[2]

    assert error((0.05, 0.1), 2_500) < error((0.05, 0.1), 10_000) < error((0.1,), 10_000) < MAX_ERROR
    assert error((0.1,), 2_500) < error((0.1,), 10_000)


@pytest.mark.parametrize("name", ["manifest.json", "ema-0.05.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_missing_or_damaged_checkpoint_among_many_is_named(run_copy, name, damage):
    path = folder_at(run_copy, 24) / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(ValueError, match=r"000000000024\S* .*(8, 16, 32|train` again)"):
        read_average(run_copy, Snapshot(64, 0.07))


def test_a_moment_without_a_checkpoint_names_those_there_are(run):
    with pytest.raises(
        ValueError, match=r"000000000020 is no checkpoint.*those at 8, 16, 24, .*, 64 images.*DIFFUSION_KEEP_LAST"
    ):
        read_average(run, Snapshot(20, 0.1))


@pytest.mark.parametrize("field", ["recipe_digest", "dataset_digest", "images_seen"])
def test_a_checkpoint_of_another_run_is_not_mixed_in(run_copy, field):
    path = folder_at(run_copy, 24) / "manifest.json"
    manifest = Manifest.model_validate_json(path.read_bytes())
    other = {"images_seen": 16}.get(field, "0" * 64)
    path.write_bytes(canonical_json(manifest.model_copy(update={field: other})))
    with pytest.raises(ValueError, match="000000000024 was made from another recipe, dataset or length"):
        read_average(run_copy, Snapshot(64, 0.07))


def test_an_edited_manifest_is_refused(run_copy):
    path = folder_at(run_copy, 24) / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"000000000024/manifest\.json is not in canonical form"):
        read_average(run_copy, Snapshot(24, 0.05))


def test_the_checkpoint_of_the_reference_is_the_one_it_names(run):
    assert digest_of(Manifest.model_validate_json(Path(run.uri, "manifest.json").read_bytes())) == run.digest
    with pytest.raises(ValueError, match=r"manifest\.json: sha256 .*expected 00000"):
        read_average(run.model_copy(update={"digest": "0" * 64}), Snapshot(64, 0.1))


def test_coefficients_are_those_of_the_averages_that_are_read(run, recipe):
    kept, coefficients, _ = check_averages(recipe, Snapshot(64, 0.07))
    files = [load_file(folder_at(run, s.images_seen) / f"ema-{s.sigma_rel}.safetensors") for s in kept]
    assert distance(read_average(run, Snapshot(64, 0.07)).weights, combine(files, coefficients)) == 0


def test_the_guide_has_the_models_width_where_it_has_none_of_its_own():
    assert wanted_by(EvaluateRecipe(ema=0.07), 64) == (Snapshot(64, 0.07), None)
    assert wanted_by(EvaluateRecipe(ema=0.07, images=16, guide_images=8), 64) == (Snapshot(16, 0.07), Snapshot(8, 0.07))
    assert wanted_by(EvaluateRecipe(ema=0.07, guide_images=8), 64) == (Snapshot(64, 0.07), Snapshot(8, 0.07))
    assert wanted_by(EvaluateRecipe(guide_images=8, guide_ema=0.05), 64) == (Snapshot(64, 0.1), Snapshot(8, 0.05))
