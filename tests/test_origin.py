"""flows/origin.py: which model a training starts from, and when there is nothing new to learn."""

from pathlib import Path

import pytest

from diffusion.recipe import (
    Lesson,
    Recipe,
    SamplingRecipe,
    ShardRecipe,
    TrainRecipe,
    canonical_json,
    checkpoints_of,
    digest_of,
)
from diffusion.store.bundle import load_model, publish_bundle
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.store.works import remember, work_path
from diffusion.training.checkpoint import name_of
from flows.dry_run import dry_train, start_told
from flows.finished import run_copies, run_folder, train_key
from flows.origin import check_news, look, origin_of, resolved, started_from
from flows.site import Site
from tests.random_bundle import CLASSES, RESOLUTION, UNET, published_model

RECIPE = TrainRecipe(unet=UNET, precision="fp32")


def dataset_of(digest: str, classes: tuple[str, ...] = CLASSES) -> DatasetRef:
    facts = {"images": 9, "holdout": 1, "rejected": 0}
    return DatasetRef(uri="/nowhere", digest=digest * 64, resolution=RESOLUTION, classes=classes, **facts)


def model_of(site: Site, recipe: TrainRecipe, dataset: DatasetRef, **changed: object) -> str:
    """Publish the model that this recipe would have made of this dataset.  Returns its digest."""
    made = Path(published_model(site.store).uri)
    spec = BundleSpec.model_validate_json((made / "bundle.json").read_bytes())
    facts = {"init": recipe.init, "recipe_digest": digest_of(recipe), "dataset_digest": dataset.digest}
    facts |= changed
    (made / "bundle.json").write_bytes(canonical_json(spec.model_copy(update=facts)))
    return publish_bundle(made, site.store)[1]


def test_a_recipe_starts_from_the_model_where_pictures_or_recipe_are_new(tmp_path):
    site, old = Site(home=tmp_path), dataset_of("a")
    digest = model_of(site, RECIPE, old)
    grown = dataset_of("b", (*CLASSES, "zebra"))
    started = started_from(RECIPE, digest, grown, site)
    assert started == RECIPE.model_copy(update={"init": digest})
    assert load_model(origin_of(started, site), digest=digest)[0].dataset_digest == old.digest
    longer = RECIPE.model_copy(update={"images": 2 * RECIPE.images})
    assert started_from(longer, digest, old, site).init == digest
    assert started_from(RECIPE, None, grown, site) == RECIPE
    assert origin_of(RECIPE, site) is None


def finished(site: Site, recipe: TrainRecipe, dataset: DatasetRef) -> Path:
    """Note that the run of this recipe and dataset is finished.  Returns its last checkpoint."""
    folder = run_folder(key := train_key(recipe, dataset), site) / "checkpoints" / name_of(checkpoints_of(recipe)[-1])
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    facts = {"digest": "c" * 64, "recipe_digest": digest_of(recipe), "dataset": dataset, "images_seen": recipe.images}
    remember(site.store, key, RunRef(uri=str(folder), **facts))
    return folder


def test_a_model_of_this_very_recipe_and_dataset_has_nothing_new_to_learn(tmp_path, capsys):
    """So a schedule that starts from the champion comes to rest: its recipe is that of the finished work."""
    site, data = Site(home=tmp_path), dataset_of("a")
    first = model_of(site, RECIPE, data)
    finished(site, RECIPE, data)
    assert started_from(RECIPE, first, data, site) == RECIPE
    assert "nothing new" in capsys.readouterr().out
    grown = dataset_of("b")
    began = started_from(RECIPE, first, grown, site)
    second = model_of(site, began, grown)
    finished(site, began, grown)
    assert started_from(RECIPE, second, grown, site) == began
    assert started_from(RECIPE, second, data, site).init == second


def test_a_model_whose_run_is_elsewhere_is_not_trained_again(tmp_path):
    """Its home is lost, or this is another one.  Where the last checkpoint is in reach, nothing is left to train."""
    site, data, copies = Site(home=tmp_path / "home"), dataset_of("a"), tmp_path / "copies"
    first = model_of(site, RECIPE, data)
    with pytest.raises(ValueError, match=f"its run is not in {site.home}.*without --init it is made once more"):
        started_from(RECIPE, first, data, site)
    with pytest.raises(ValueError, match=f"its run is not in {site.home}"):
        check_news(RECIPE, first, data, site)
    check_news(RECIPE, first, dataset_of("b"), site)
    check_news(RECIPE.model_copy(update={"init": first}), None, data, site)
    check_news(RECIPE, None, data, site)
    second = model_of(site, began := RECIPE.model_copy(update={"init": first}), grown := dataset_of("b"))
    with pytest.raises(ValueError, match=f"without --init, with --set train.init={first}, it is made once more"):
        started_from(RECIPE, second, grown, site)
    key, last = train_key(RECIPE, data), name_of(checkpoints_of(RECIPE)[-1])
    copied = Site(home=site.home, runs=str(copies))
    with pytest.raises(ValueError, match="all of it would be trained again"):
        started_from(RECIPE, first, data, copied)
    (there := Path(run_copies(key, copied), last)).mkdir(parents=True)
    (there / "manifest.json").touch()
    assert started_from(RECIPE, first, data, copied) == RECIPE
    work_path(site.store, train_key(began, grown)).parent.mkdir()
    finished(site, began, grown)
    work_path(site.store, train_key(began, grown)).unlink()  # killed before it could be noted
    assert started_from(RECIPE, second, grown, site) == began


def test_what_a_run_would_start_from_is_known_without_writing_anything(tmp_path, capsys):
    site, data = Site(home=tmp_path / "home"), dataset_of("a")
    assert look(RECIPE, None, RESOLUTION, site) == (RECIPE, None)
    with pytest.raises(ValueError, match="no model 'mine' is registered; there are: none"):
        look(RECIPE, "mine", RESOLUTION, site)
    assert list(tmp_path.iterdir()) == []
    digest = model_of(site, RECIPE, data)
    recipe, spec = look(RECIPE, digest, RESOLUTION, site)
    assert (recipe, None) == (RECIPE.model_copy(update={"init": digest}), spec.init)
    assert look(recipe, None, RESOLUTION, site) == (recipe, spec)  # as --set train.init says it
    lesson = Lesson(teacher=digest, by=SamplingRecipe(), student=SamplingRecipe(sampler="ddim", guidance=1.0, steps=4))
    student = model_of(site, RECIPE, data, lesson=lesson, sampling=lesson.student)
    assert look(RECIPE, student, RESOLUTION, site) == (recipe, spec)
    wide = RECIPE.model_copy(update={"unet": UNET.model_copy(update={"channels": 48})})
    for given, init in ((wide, digest), (wide.model_copy(update={"init": digest}), None)):
        with pytest.raises(ValueError, match=r"train.unet.channels is 48, .* 32"):
            look(given, init, RESOLUTION, site)
    with pytest.raises(ValueError, match="the store has no such model"):
        look(RECIPE, "0" * 64, RESOLUTION, site)
    with pytest.raises(ValueError, match="give one of the two"):
        look(recipe, digest, RESOLUTION, site)
    assert capsys.readouterr().out == ""


def test_a_dry_run_says_where_it_would_start_and_what_becomes_of_the_classes(tmp_path, capsys):
    site = Site(home=tmp_path, workers=1, gpu=False)
    line = Recipe.model_construct(train=RECIPE, shard=ShardRecipe(resolution=RESOLUTION))
    digest = model_of(site, RECIPE, dataset_of("a"))
    dry_train(line, None, site, digest)
    said = capsys.readouterr().out
    assert f"starts from the model {digest[:16]}" in said
    assert "classes" not in said
    _, spec = look(RECIPE, digest, RESOLUTION, site)
    told = start_told(digest, spec, dataset_of("b", ("zebra", *CLASSES[1:])))
    assert told.endswith(f"new classes: zebra; left behind: {CLASSES[0]}")
    narrow = line.model_copy(update={"train": RECIPE.model_copy(update={"prediction": "v"})})
    with pytest.raises(ValueError, match=r"train\.prediction is v, .* edm"):
        dry_train(narrow, None, site, digest)


def test_in_the_place_of_a_student_stands_its_teacher(tmp_path):
    site, data = Site(home=tmp_path), dataset_of("a")
    teacher = model_of(site, RECIPE, data)
    finished(site, RECIPE, data)
    draws = SamplingRecipe(sampler="ddim", guidance=1.0, steps=4)
    lesson = Lesson(teacher=teacher, by=SamplingRecipe(), student=draws)
    student = model_of(site, RECIPE, data, lesson=lesson, sampling=draws)
    assert started_from(RECIPE, student, dataset_of("b"), site).init == teacher
    assert started_from(RECIPE, student, data, site) == RECIPE


def test_mistakes_are_told_in_words(tmp_path):
    site, data = Site(home=tmp_path), dataset_of("a")
    digest = model_of(site, RECIPE, dataset_of("b"))
    assert resolved(digest, site) == digest
    wide = RECIPE.model_copy(update={"unet": UNET.model_copy(update={"channels": 48})})
    with pytest.raises(ValueError, match=r"train.unet.channels is 48, .* 32"):
        started_from(wide, digest, data, site)
    with pytest.raises(ValueError, match=r"the store has no such model.*--init NAME"):
        started_from(RECIPE, "0" * 64, data, site)
    with pytest.raises(ValueError, match="give one of the two"):
        started_from(RECIPE.model_copy(update={"init": digest}), digest, data, site)
