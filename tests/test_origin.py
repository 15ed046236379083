"""flows/origin.py: which model a training starts from, and when there is nothing new to learn."""

from pathlib import Path

import pytest

from diffusion.recipe import Lesson, SamplingRecipe, TrainRecipe, canonical_json, digest_of
from diffusion.store.bundle import BundleSpec, load_model, publish_bundle
from diffusion.store.refs import DatasetRef
from flows.origin import origin_of, resolved, started_from
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


def test_a_model_of_this_very_recipe_and_dataset_has_nothing_new_to_learn(tmp_path, capsys):
    """So a schedule that starts from the champion comes to rest: its recipe is that of the finished work."""
    site, data = Site(home=tmp_path), dataset_of("a")
    first = model_of(site, RECIPE, data)
    assert started_from(RECIPE, first, data, site) == RECIPE
    assert "nothing new" in capsys.readouterr().out
    grown = dataset_of("b")
    began = started_from(RECIPE, first, grown, site)
    second = model_of(site, began, grown)
    assert started_from(RECIPE, second, grown, site) == began
    assert started_from(RECIPE, second, data, site).init == second


def test_in_the_place_of_a_student_stands_its_teacher(tmp_path):
    site, data = Site(home=tmp_path), dataset_of("a")
    teacher = model_of(site, RECIPE, data)
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
