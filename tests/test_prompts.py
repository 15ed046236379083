"""Drawing from prompts: by the engine, in an evaluation, by the command line and the registry's model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.data.images import to_uint8
from diffusion.guidance import classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.sampler import SAMPLERS, run
from diffusion.schedule import karras_sigmas
from diffusion.serving.engine import Engine, trial_query
from diffusion.serving.request import GenerateRequest
from diffusion.serving.ticket import DrawingFailed
from diffusion.text import remembering
from tests.random_bundle import CLASSES, RESOLUTION, random_bundle, reading_bundle, reading_spec
from tests.words import TOKENS, WIDTH, embed, words

MIXED = [
    GenerateRequest(prompt="a red flag", seed=1, n=2),
    GenerateRequest(label="cat", seed=1, steps=3),
    GenerateRequest(label="cat", prompt="a red flag", seed=1, n=2, guidance=3.5),
    GenerateRequest(prompt="a red flag waves in the wind for ever", seed=1, sampler="ddim", steps=6, guidance=1),
    GenerateRequest(prompt="a", label="dog", seed=1, sampler="ddpm", steps=4),
    GenerateRequest(seed=1, sampler="dpmpp_2m", steps=4),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(reading_bundle("fp32"), slots=4)


class Heard(torch.nn.Module):
    """The denoiser of a bundle, which notes how it was asked."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.asked = inner, []

    def forward(self, x, sigma, **cond):
        self.asked.append(cond)
        return self.inner(x, sigma, **cond)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_pictures_are_the_same_alone_and_among_requests_of_every_kind(precision):
    engine = Engine(reading_bundle(precision), slots=5)
    alone = [engine.generate([request])[0] for request in MIXED]
    pictures = [picture.tobytes() for drawn in alone for picture in drawn]
    assert len(set(pictures)) == len(pictures) == sum(request.n for request in MIXED)
    for order in (range(len(MIXED)), (5, 2, 0, 4, 1, 3)):
        for i, drawn in zip(order, engine.generate([MIXED[i] for i in order]), strict=True):
            assert np.array_equal(drawn, alone[i])


@pytest.mark.parametrize("request_", MIXED, ids=range(len(MIXED)))
def test_pictures_are_those_of_the_plain_sampler(engine, request_):
    """An independent slow version, without engine or ladder; the null side has neither class nor prompt."""
    bundle, request = engine.bundle, request_
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(request.steps or recipe.steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    index = torch.tensor([len(CLASSES) if request.label is None else CLASSES.index(request.label)])
    null = {"label": torch.tensor([len(CLASSES)]), "text": torch.zeros(1, TOKENS, WIDTH)}
    null["text_mask"] = torch.zeros(1, TOKENS, dtype=torch.bool)
    cond = null | {"label": index}
    if request.prompt:
        tokens = embed(request.prompt)
        cond["text"], cond["text_mask"] = null["text"].clone(), (torch.arange(TOKENS) < len(tokens))[None]
        cond["text"][0, : len(tokens)] = tokens
    for i, picture in enumerate(engine.generate([request])[0]):
        shape = (3, RESOLUTION, RESOLUTION)
        x = normal(1, Stream.INITIAL, torch.tensor([i]), shape) * recipe.sigma_max
        fresh = [normal(1, Stream.CHURN, torch.tensor([(step << 32) + i]), shape) for step in range(10)]
        conversation = SAMPLERS[request.sampler or recipe.sampler](x, sigmas, fresh.__getitem__)
        if request.label is None and request.prompt is None:
            conversation = conditioned(conversation, null)
        else:
            guidance = recipe.guidance if request.guidance is None else request.guidance
            conversation = classifier_free(conversation, cond, null, guidance)
        expected = to_uint8(run(conversation, bundle.denoiser))[0].numpy()
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_an_unguided_prompt_is_one_row_and_a_guided_one_two(engine, monkeypatch):
    rows, tick = [], engine.tick
    monkeypatch.setattr(engine, "tick", lambda: rows.append(tick()))
    engine.generate([GenerateRequest(prompt="a", seed=0, steps=2, guidance=1)])
    engine.generate([GenerateRequest(prompt="a", seed=0, steps=2)])
    assert [r for r in rows if r] == [1] * 3 + [2] * 3


def test_a_prompt_is_encoded_once_while_it_is_remembered():
    read = []

    def reading(caption):
        read.append(caption)
        return embed(caption)

    bundle = reading_bundle("fp32")
    engine = Engine(replace(bundle, encoder=remembering(replace(words(), embed=reading), 2)), slots=2)
    engine.generate([GenerateRequest(prompt="a", seed=0, n=5, steps=2), GenerateRequest(prompt="b", seed=0, steps=2)])
    engine.generate([GenerateRequest(prompt="a", label="cat", seed=1, steps=2)])
    assert read == ["a", "b"]
    engine.generate([GenerateRequest(prompt=prompt, seed=0, steps=2) for prompt in "cda"])
    assert read == ["a", "b", "c", "d", "a"]


def test_an_encoder_that_fails_fails_its_own_request_only(engine):
    def unable(caption):
        raise RuntimeError("no such word")

    broken = Engine(replace(engine.bundle, encoder=replace(words(), embed=unable)), slots=2)
    with pytest.raises(DrawingFailed, match="no such word"):
        broken.generate([GenerateRequest(prompt="a", seed=0, steps=2)])
    with pytest.raises(DrawingFailed, match="no such word"):
        broken.self_test()
    wanted = GenerateRequest(label="cat", seed=0, steps=2)
    assert np.array_equal(broken.generate([wanted]), engine.generate([wanted]))


@pytest.mark.parametrize("rows", [8, 64])
def test_the_ladder_is_proven_with_texts_from_none_to_the_longest(rows):
    spec = reading_spec()
    query = trial_query(spec, rows, 0, torch.device("cpu"))
    lengths = query.cond["text_mask"].sum(1)
    assert set(lengths.tolist()) == set(range(TOKENS + 1))
    assert query.cond["text"].shape == (rows, TOKENS, WIDTH)
    assert torch.equal(query.cond["text"].abs().sum(2) > 0, query.cond["text_mask"])
    other = trial_query(spec, rows, 1, torch.device("cpu"))
    assert not torch.equal(other.cond["text"], query.cond["text"])
    assert trial_query(random_bundle().spec, rows, 0, torch.device("cpu")).cond.keys() == {"label"}


def test_every_call_has_the_columns_of_a_text_and_the_null_side_none_of_its_tokens():
    bundle = reading_bundle("fp32")
    heard = Heard(bundle.denoiser)
    engine = Engine(replace(bundle, denoiser=heard), slots=4)
    assert all(cond.keys() == {"label", "text", "text_mask"} for cond in heard.asked)
    heard.asked.clear()
    engine.generate([GenerateRequest(label="dog", prompt="a red flag", seed=0, steps=2)])
    for cond in heard.asked:
        assert cond["label"].tolist()[:2] == [1, len(CLASSES)]
        assert cond["text_mask"].sum(1).tolist()[:2] == [3, 0]
        assert not cond["text"][1].any()
    heard.asked.clear()
    engine.self_test()
    assert any(cond["text_mask"].any() for cond in heard.asked)
