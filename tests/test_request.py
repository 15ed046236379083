import json
from typing import get_args

import pytest

from diffusion.recipe import SamplerName, ServeRecipe
from diffusion.serving.request import GenerateRequest, RequestError, once_each, parse, resolve
from tests.random_bundle import CLASSES, random_spec, reading_spec

SPEC, READS = random_spec("bf16", "4" * 64, 1), reading_spec()


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
        ({"lable": "cat"}, "lable", "lable", list(GenerateRequest.model_fields)),
        ({"class": "cat", "label": "cat"}, "class", "label and class", None),
        ({"\ud800": 1}, "?", "unknown field '?'", list(GenerateRequest.model_fields)),
        ({"prompt": 3}, "prompt", "3", None),
        ({"prompt": ""}, "prompt", "''", None),
        ({"prompt": " \u3000"}, "prompt", "has words", None),
        ({"prompt": "x" * 301}, "prompt", "at most 300", None),
        ({"prompt": "a\nb"}, "prompt", r"without '\n'", None),
        ({"prompt": "a\ud800"}, "prompt", r"\ud800", None),
        ({"prompt": "\u200d \u200c"}, "prompt", "has words", None),
        ({"prompt": "a\u202eb"}, "prompt", r"without '\u202e'", None),  # turns the direction of what follows
        ({"prompt": "a\u200bb"}, "prompt", r"without '\u200b'", None),
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


def test_a_name_given_twice_is_refused_and_not_decided():
    assert json.loads('{"n": 1, "label": "cat"}', object_pairs_hook=once_each) == {"n": 1, "label": "cat"}
    for body, name in (('{"seed": 1, "n": 2, "seed": 1}', "seed"), ('{"\\ud800": 1, "\\ud800": 2}', "?")):
        with pytest.raises(RequestError, match="is given twice: give it once") as caught:
            json.loads(body, object_pairs_hook=once_each)
        assert caught.value.param == name
        str(caught.value).encode()


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


@pytest.mark.parametrize(
    "prompt",
    [
        "a red flag",
        "x" * 300,
        "un drapeau rouge, très beau",
        "\U0001f600 \u7b11\u8138",
        "\u0645\u06cc\u200c\u062e\u0646\u062f\u062f",  # Persian, "laughs": the joiner keeps its two parts apart
        "\U0001f469\u200d\U0001f680",  # a woman astronaut: without the joiner a woman and a rocket
    ],
)
def test_a_prompt_is_taken_as_it_is(prompt):
    assert resolve(parse(GenerateRequest, {"prompt": prompt}), READS).prompt == prompt


def test_a_model_without_captions_refuses_a_prompt_by_name():
    with pytest.raises(RequestError, match="prompt='a red flag': this model reads no prompts") as caught:
        resolve(GenerateRequest(label="cat", prompt="a red flag"), SPEC)
    assert (caught.value.param, caught.value.allowed) == ("prompt", [None])


@pytest.mark.parametrize(
    ("given", "guided"),
    [({}, False), ({"label": "cat"}, True), ({"prompt": "a"}, True), ({"label": "cat", "prompt": "a"}, True)],
)
def test_label_and_prompt_are_given_together_or_apart_and_either_is_guided(given, guided):
    resolved = resolve(GenerateRequest(**given), READS)
    assert (resolved.label, resolved.prompt) == (given.get("label"), given.get("prompt"))
    assert resolved.label_index == (0 if "label" in given else len(CLASSES))
    assert (resolved.guided, resolved.guidance) == (guided, READS.sampling.guidance if guided else 1)
    assert not resolve(GenerateRequest(**given, guidance=1), READS).guided


def test_guidance_of_nothing_is_refused_where_prompts_are_read():
    with pytest.raises(RequestError, match="Give a label or a prompt"):
        resolve(GenerateRequest(guidance=3), READS)
    assert resolve(GenerateRequest(guidance=3, prompt="a"), READS).guidance == 3


def test_more_steps_than_the_models_chain_has_are_refused():
    recipe = SPEC.sampling.model_copy(update={"spacing": "trailing", "chain_steps": 20})
    spec = SPEC.model_copy(update={"sampling": recipe})
    assert resolve(GenerateRequest(steps=20), spec).steps == 20
    with pytest.raises(RequestError, match="steps=21: the linear chain of 20 steps") as caught:
        resolve(GenerateRequest(steps=21), spec)
    assert caught.value.param == "steps"
