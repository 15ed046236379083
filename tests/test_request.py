from typing import get_args

import pytest

from diffusion.recipe import SamplerName, ServeRecipe
from diffusion.serving.request import GenerateRequest, RequestError, parse, resolve
from tests.random_bundle import CLASSES, random_spec

SPEC = random_spec("bf16", "4" * 64, 1)


@pytest.mark.parametrize(
    ("data", "param", "value", "allowed"),
    [
        ({"n": 0}, "n", "0", {"minimum": 1}),
        ({"n": True}, "n", "True", {"minimum": 1}),
        ({"n": "2"}, "n", "'2'", {"minimum": 1}),
        ({"seed": -1}, "seed", "-1", {"minimum": 0, "maximum": 2**32 - 1}),
        ({"seed": 2**32}, "seed", "4294967296", {"minimum": 0, "maximum": 2**32 - 1}),
        ({"seed": 1.5}, "seed", "1.5", {"minimum": 0, "maximum": 2**32 - 1}),
        ({"steps": 1}, "steps", "1", {"minimum": 2, "maximum": 1000}),
        ({"guidance": 20.5}, "guidance", "20.5", {"minimum": 0, "maximum": 20}),
        ({"guidance": float("nan")}, "guidance", "nan", {"minimum": 0, "maximum": 20}),
        ({"sampler": "euler"}, "sampler", "'euler'", list(get_args(SamplerName))),
        ({"label": 3}, "label", "3", None),
        ({"lable": "cat"}, "lable", "lable", ["label", "n", "seed", "sampler", "steps", "guidance"]),
        ({"class": "cat", "label": "cat"}, "class", "label and class", None),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(data, param, value, allowed):
    with pytest.raises(RequestError) as caught:
        parse(GenerateRequest, data)
    assert caught.value.param == param
    assert caught.value.allowed == allowed
    assert param in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("data", "allowed"),
    [({"n": 0}, {"minimum": 1, "maximum": 4}), ({"steps": 2_000}, {"minimum": 2, "maximum": 6})],
)
def test_what_is_allowed_is_what_this_server_allows(data, allowed):
    with pytest.raises(RequestError) as caught:
        parse(GenerateRequest, data, ServeRecipe(max_n=4, max_steps=6))
    assert caught.value.allowed == allowed
    assert f"allowed: {allowed['minimum']} to {allowed['maximum']}" in str(caught.value)


def test_a_long_value_is_not_repeated_in_full():
    with pytest.raises(RequestError) as caught:
        parse(GenerateRequest, {"sampler": "x" * 10_000})
    assert len(str(caught.value)) < 300


def test_defaults_come_from_the_model():
    resolved = resolve(GenerateRequest(label="dog", seed=4), SPEC)
    sampling = SPEC.sampling
    assert (resolved.sampler, resolved.steps, resolved.guidance) == (
        sampling.sampler,
        sampling.steps,
        sampling.guidance,
    )
    assert (resolved.label_index, resolved.n, resolved.seed) == (1, 1, 4)


def test_class_is_another_name_of_label():
    assert parse(GenerateRequest, {"class": "cat"}) == parse(GenerateRequest, {"label": "cat"})


def test_zero_is_a_value_and_not_a_default():
    resolved = resolve(GenerateRequest(label="dog", seed=0, guidance=0), SPEC)
    assert (resolved.seed, resolved.guidance) == (0, 0)


def test_no_label_is_the_null_label_without_guidance():
    resolved = resolve(GenerateRequest(seed=1), SPEC)
    assert (resolved.label, resolved.label_index, resolved.guidance) == (None, len(CLASSES), 1)
    with pytest.raises(RequestError, match="no label") as caught:
        resolve(GenerateRequest(guidance=3), SPEC)
    assert caught.value.param == "guidance"


def test_a_missing_seed_is_drawn_in_range_and_differs():
    seeds = {resolve(GenerateRequest(), SPEC).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_an_unknown_class_lists_the_classes_and_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'cat'") as caught:
        resolve(GenerateRequest(label="cats"), SPEC)
    assert caught.value.allowed == list(CLASSES)


@pytest.mark.parametrize(("field", "limit"), [("n", 4), ("steps", 6)])
def test_limits_of_the_server(field, limit):
    limits = ServeRecipe(max_n=4, max_steps=6)
    assert getattr(resolve(GenerateRequest(**{field: limit}), SPEC, limits), field) == limit
    with pytest.raises(RequestError, match=f"{field}={limit + 1}") as caught:
        resolve(GenerateRequest(**{field: limit + 1}), SPEC, limits)
    assert caught.value.allowed["maximum"] == limit
    assert getattr(resolve(GenerateRequest(**{field: limit + 1}), SPEC), field) == limit + 1


def test_a_models_own_steps_obey_the_limit_too():
    with pytest.raises(RequestError, match="steps=5"):
        resolve(GenerateRequest(), SPEC, ServeRecipe(max_steps=4))
