"""What an engine draws: the same alone and among others, and what the samplers draw by hand."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.data.images import to_uint8
from diffusion.guidance import classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.recipe import SamplingRecipe
from diffusion.sampler import SAMPLERS, run
from diffusion.schedule import karras_sigmas
from diffusion.serving.engine import Engine
from diffusion.serving.job import converse
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.trial import trial_query
from diffusion.spacing import sampling_sigmas
from tests.random_bundle import CLASSES, RESOLUTION, random_bundle, restoring_bundle
from tests.running_engine import MIXED, ask, running, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def engine(request) -> Engine:
    return Engine(random_bundle(request.param), slots=5)


def test_pictures_are_the_same_alone_and_among_others(engine):
    alone = [engine.generate([request])[0] for request in MIXED]
    assert len({picture.tobytes() for pictures in alone for picture in pictures}) == sum(r.n for r in MIXED)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
        together = engine.generate([MIXED[i] for i in order])
        for i, pictures in zip(order, together, strict=True):
            assert same(pictures, alone[i])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_pictures_are_the_same_alone_and_among_others_with_two_threads(precision):
    torch.set_num_threads(2)
    try:
        engine = Engine(random_bundle(precision), slots=4)
        requests = [MIXED[3], MIXED[5]]
        alone = [engine.generate([request])[0] for request in requests]
        for pictures, expected in zip(engine.generate(requests), alone, strict=True):
            assert same(pictures, expected)
    finally:
        torch.set_num_threads(1)


def test_pictures_do_not_depend_on_the_number_of_slots(engine):
    small = Engine(engine.bundle, slots=1)
    large = Engine(engine.bundle, slots=16)
    for left, right in zip(small.generate(MIXED), large.generate(MIXED), strict=True):
        assert same(left, right)


def test_a_picture_does_not_depend_on_how_many_its_request_has(engine):
    many = engine.generate([GenerateRequest(label="cat", seed=9, n=7)])[0]
    for n in (1, 2, 3):
        assert same(engine.generate([GenerateRequest(label="cat", seed=9, n=n)])[0], many[:n])


def test_pictures_are_the_same_when_many_threads_ask_a_running_engine(engine):
    alone = engine.generate(MIXED)
    wanted = [i for i in range(len(MIXED)) for _ in range(3)]
    random.Random(0).shuffle(wanted)
    with running(engine), ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: ask(engine, **MIXED[i].model_dump()).future.result(60), wanted))
    for i, pictures in zip(wanted, got, strict=True):
        assert same(pictures, alone[i])


@pytest.mark.parametrize("spacing", ["karras", "exponential", "trailing", "leading", "linspace"])
def test_levels_are_spaced_as_the_models_recipe_says(spacing):
    bundle = random_bundle("fp32")
    recipe = SamplingRecipe(sampler="ddim", spacing=spacing, chain="cosine")
    bundle = replace(bundle, spec=bundle.spec.model_copy(update={"sampling": recipe}))
    levels = []

    def denoise(x, sigma, **cond):
        levels.append(sigma.item())
        return x

    run(converse(resolve(GenerateRequest(steps=7), bundle.spec), range(1), bundle, torch.device("cpu")), denoise)
    assert levels == pytest.approx(sampling_sigmas(recipe, 7)[:-1].tolist())


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_pictures_are_those_of_the_plain_sampler(index):
    """An independent slow version: the samplers run by hand, one picture at a time, without engine or ladder."""
    bundle, request = random_bundle("fp32"), MIXED[index]
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(request.steps or recipe.steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    guidance = recipe.guidance if request.guidance is None else request.guidance
    null = torch.tensor([len(CLASSES)])
    for i, picture in enumerate(Engine(bundle, slots=8).generate([request])[0]):
        shape = (3, RESOLUTION, RESOLUTION)
        x = normal(request.seed, Stream.INITIAL, torch.tensor([i]), shape) * recipe.sigma_max
        fresh = [normal(request.seed, Stream.CHURN, torch.tensor([(step << 32) + i]), shape) for step in range(50)]
        conversation = SAMPLERS[request.sampler or recipe.sampler](x, sigmas, fresh.__getitem__)
        if request.label is None:
            conversation = conditioned(conversation, {"label": null})
        else:
            label = torch.tensor([CLASSES.index(request.label)])
            conversation = classifier_free(conversation, {"label": label}, {"label": null}, guidance)
        expected = to_uint8(run(conversation, bundle.denoiser))[0].numpy()
        # the batch sizes differ, so the last bits of fp32 do, which may tip a pixel over a rounding
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_a_model_that_restores_draws_as_with_nothing_beside_x():
    bundle = restoring_bundle()
    engine = Engine(bundle, slots=4)
    (picture,) = engine.generate([GenerateRequest(seed=3, sampler="ddim", steps=4)])[0]
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(4, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    x = normal(3, Stream.INITIAL, torch.tensor([0]), (3, RESOLUTION, RESOLUTION)) * recipe.sigma_max
    expected = to_uint8(run(SAMPLERS["ddim"](x, sigmas), bundle.denoiser))[0].numpy()
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1
    shown = trial_query(bundle.spec, 8, 0, torch.device("cpu")).cond["image"].flatten(1).any(dim=1)
    assert 0 < shown.sum() < 8  # the ladder is proven with measurements and without
