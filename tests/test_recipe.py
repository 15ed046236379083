import json
from typing import get_args

import pytest
from pydantic import ValidationError

from diffusion.presets import PRESETS
from diffusion.recipe import Recipe, SamplerName, TrainRecipe, canonical_json, checkpoints_of, digest_of
from diffusion.sampler import SAMPLERS


def test_equal_recipes_have_equal_digests_and_unlike_ones_do_not():
    recipe = PRESETS["demo"]()
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert digest_of(again) == digest_of(recipe)
    assert digest_of(recipe.model_copy(update={"train": TrainRecipe(seed=1)})) != digest_of(recipe)


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1.5, "ü"]}) == canonical_json({"a": [1.5, "ü"], "b": 1})
    assert json.loads(canonical_json({"a": "ü"})) == {"a": "ü"}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_valid_named_and_documented(name):
    assert Recipe.model_validate(PRESETS[name]().model_dump())
    assert f"--preset {name}" in PRESETS[name].__doc__ or f"make {name}" in PRESETS[name].__doc__


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lerning_rate": 1.0}, "lerning_rate"),
        ({"lr": float("nan")}, "lr"),
        ({"ema": (0.5,)}, "0.28"),
        ({"precision": "fp8"}, "bf16"),
        ({"batch_size": 0}, "batch_size"),
        ({"text_encoder": "minilm"}, "give both, or none and 0"),
        ({"unet": {"text_width": 384}}, "give both, or none and 0"),
        ({"prediction": "noise"}, "epsilon"),
        ({"noise_min": 2.0, "noise_max": 1.0}, "noise_max"),
        ({"unet": {"image_channels": 3}}, "image_channels"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(change, word):
    with pytest.raises(ValidationError, match=word):
        TrainRecipe(**change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"evaluate": {"ema": 0.28}}, "ema"),
        ({"evaluate": {"guide_images": 10_000}}, "guide_images=10000: .* at 10016, 20000, 30016, 33024 images"),
        ({"evaluate": {"images": 10_000}}, "evaluate.images=10000: .* at 10016, 20000, 30016, 33024 images"),
        ({"evaluate": {"images": 10_016, "guide_images": 20_000}}, "the worse model is not a later one"),
        ({"evaluate": {"images": 10_016, "guide_images": 10_016}}, "the worse model is the model itself"),
        ({"evaluate": {"guide_images": 33_024}}, "the worse model is the model itself"),
        ({"evaluate": {"guide_images": 33_024, "guide_ema": 0.1}}, "the worse model is the model itself"),
        ({"evaluate": {"guide_ema": 0.05}}, "give evaluate.guide_images"),
        ({"evaluate": {"sampling": {"guidance_kind": "autoguidance"}}}, "checkpoint .* evaluate.guide_images"),
        ({"evaluate": {"sampling": {"guidance_kind": "cfg"}}}, "'classifier_free' or 'autoguidance'"),
        ({"evaluate": {"sampling": {"guidance_rescale": 1.1}}}, "guidance_rescale"),
        ({"evaluate": {"loss_levels": ()}}, "loss_levels"),
        ({"evaluate": {"loss_levels": (-1.0,)}}, "loss_levels"),
        ({"evaluate": {"sampling": {"guidance_interval": (5.0, 1.0)}}}, "lowest sigma first"),
        (
            {
                "shard": {"resolution": 24},
                "train": {"unet": {"multipliers": (1, 1, 1, 1), "blocks": (1, 1, 1, 1), "stem": 4}},
            },
            "divisible",
        ),
        ({"train": {"unet": {"attention": (5,)}}}, "the sides"),
        (
            {"shard": {"resolution": 256}},
            r"resolution=256 .* sides \[128, 64, 32\]: .*`--set train.unet.attention=\[32\]`",
        ),
        ({"train": {"unet": {"blocks": (1, 2)}}}, "one of each per level"),
        ({"train": {"unet": {"attention": (), "text_width": 384}}}, "where there is attention"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(change, word):
    with pytest.raises(ValidationError, match=word):
        Recipe.model_validate(change)


def test_checkpoints_are_whole_batches_and_end_with_the_run():
    recipe = TrainRecipe(images=100, batch_size=12, checkpoint_images=40)
    assert checkpoints_of(recipe) == (48, 84, 108)
    assert checkpoints_of(recipe.model_copy(update={"checkpoint_images": 5})) == tuple(range(12, 109, 12))
    assert checkpoints_of(recipe.model_copy(update={"checkpoint_images": 1_000})) == (108,)


@pytest.mark.parametrize("setting", [{"ema": 0.2}, {"guide_images": 33_024, "guide_ema": 0.05}, {"images": 20_000}])
def test_any_average_may_be_asked_for(setting):
    assert Recipe.model_validate({"evaluate": setting})


def test_a_recipe_without_what_is_new_is_written_as_before():
    written = PRESETS["demo"]().evaluate.model_dump()
    assert not {"images", "guide_images", "guide_ema"} & written.keys()
    assert not {"guidance_kind", "guidance_rescale"} & written["sampling"].keys()


def test_every_sampler_has_its_name_in_recipes():
    assert set(get_args(SamplerName)) == set(SAMPLERS)
