"""warm_start.py: what is put together answers as the model that it starts from, and whatever else is refused."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.recipe import Lesson, TrainRecipe
from diffusion.store.bundle import Bundle
from diffusion.training.step import TrainState, build_state
from diffusion.training.warm_start import check_origin, warm_start
from tests.random_bundle import CLASSES, RESOLUTION, TASKS, UNET, random_bundle, reading_bundle, restoring_bundle
from tests.words import TOKENS, WIDTH, embed, install, words

PLAIN = TrainRecipe(unet=UNET, precision="fp32")
READING = {"text_encoder": "minilm", "text_tokens": TOKENS, "unet": UNET.model_dump() | {"text_width": WIDTH}}
RESTORING = {"degradations": TASKS}
GROWN = ("bird", *reversed(CLASSES), "zebra")  # sorted otherwise, with new ones before and behind


def recipe_of(*changes: dict) -> TrainRecipe:
    values = PLAIN.model_dump()
    for change in changes:
        values |= change
    return TrainRecipe.model_validate(values)


def started(bundle: Bundle, recipe: TrainRecipe, classes: tuple[str, ...]) -> TrainState:
    check_origin(recipe, RESOLUTION, bundle.spec)
    state = build_state(recipe, resolution=RESOLUTION, classes=len(classes), device="cpu")
    warm_start(state, classes, bundle.spec, bundle.denoiser)
    return state


def asked(classes: tuple[str, ...], of: tuple[str, ...] = CLASSES) -> dict[str, torch.Tensor]:
    """A picture of each of the model's classes and one of none, at several noise levels."""
    generator = torch.Generator().manual_seed(1)
    label = [classes.index(name) for name in of] + [len(classes)]
    x = torch.randn(len(label), 3, RESOLUTION, RESOLUTION, generator=generator)
    return {"x": x, "sigma": torch.tensor([0.1, 1.0, 5.0, 40.0]), "label": torch.tensor(label)}


@pytest.mark.parametrize(
    ("precision", "changes", "classes"),
    product(("fp32", "bf16"), ((), (READING,), (RESTORING,), (READING, RESTORING)), (CLASSES, GROWN)),
)
def test_the_network_answers_as_the_model_before_its_first_step(precision, changes, classes, monkeypatch):
    """To the last bit, whatever was added, and whatever the new conditions show."""
    install(monkeypatch)
    bundle = random_bundle(precision)
    state = started(bundle, recipe_of({"precision": precision}, *changes), classes)
    cond = {}
    if READING in changes:
        cond |= {"text": embed("a red cat").expand(4, 3, WIDTH), "text_mask": torch.ones(4, 3, dtype=torch.bool)}
    if RESTORING in changes:
        cond["image"] = torch.randn(4, 6, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(2))
    state.net.eval()
    with torch.no_grad():
        assert torch.equal(state.net(**asked(classes), **cond), bundle.denoiser(**asked(CLASSES)))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([*CLASSES, "bird", "zebra", "cat "]), min_size=1, unique=True).map(tuple))
def test_classes_are_told_by_name(classes):
    """Rows follow names, a class that is new starts as none does, and what is said of them is so."""
    bundle = random_bundle("fp32")
    state = build_state(PLAIN, resolution=RESOLUTION, classes=len(classes), device="cpu")
    carried = warm_start(state, classes, bundle.spec, bundle.denoiser)
    old, new = bundle.denoiser.net.embedding.label.weight, state.net.net.embedding.label.weight
    for i, name in enumerate((*classes, None)):
        assert torch.equal(new[i], old[CLASSES.index(name)] if name in CLASSES else old[-1])
    assert set(carried.kept) | set(carried.new) == set(classes)
    assert set(carried.kept) | set(carried.dropped) == set(CLASSES)


def test_a_class_learned_moves_no_other_and_the_averages_start_from_the_model():
    bundle = random_bundle("fp32")
    state = started(bundle, PLAIN, GROWN)
    assert state.images_seen == 0
    assert optimizer_is_fresh(state)
    for sigma_rel in PLAIN.ema:
        average = state.ema.state_dict(sigma_rel)
        assert all(torch.equal(average[name], weight) for name, weight in state.net.named_parameters())
    label = torch.full((4,), GROWN.index("zebra"))
    state.net(**asked(CLASSES) | {"label": label}).square().mean().backward()
    moved = state.net.net.embedding.label.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [name == "zebra" for name in GROWN] + [False]


def optimizer_is_fresh(state: TrainState) -> bool:
    return not any(state.optimizer.state.values())


def test_what_a_model_can_do_already_goes_on(monkeypatch):
    install(monkeypatch)
    reads, restores = reading_bundle("fp32", words("minilm")), restoring_bundle()
    text = {"text": embed("a red cat").expand(4, 3, WIDTH)}
    image = {"image": torch.ones(4, 6, RESOLUTION, RESOLUTION)}
    for bundle, change, cond in ((reads, READING, text), (restores, RESTORING, image)):
        state = started(bundle, recipe_of(change), CLASSES)
        with torch.no_grad():
            assert torch.equal(state.net(**asked(CLASSES), **cond), bundle.denoiser(**asked(CLASSES), **cond))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unet": UNET.model_dump() | {"channels": 48}}, "train.unet.channels is 48, .* 32: .* train.unet.channels=32"),
        ({"unet": UNET.model_dump() | {"multipliers": (1, 3)}}, "multipliers=1,2"),
        ({"unet": UNET.model_dump() | {"blocks": (2, 1)}}, "blocks=1,1"),
        ({"unet": UNET.model_dump() | {"attention": (4,)}}, "attention=8"),
        ({"unet": UNET.model_dump() | {"attention": (8, 4)}}, "attention=8"),
        ({"unet": UNET.model_dump() | {"stem": 1, "attention": (16,)}}, "stem=2"),
        ({"prediction": "v"}, "prediction=edm"),
        ({"sigma_data": 0.25}, "sigma_data=0.5"),
        ({"codec": "autoencoder-kl", "codec_channels": 4, "codec_factor": 2}, "codec=none"),
    ],
)
def test_another_network_is_refused_by_its_first_difference(change, named):
    with pytest.raises(ValueError, match=named):
        check_origin(recipe_of(change), RESOLUTION, random_bundle("fp32").spec)


def test_a_condition_is_not_lost_silently(monkeypatch):
    install(monkeypatch)
    with pytest.raises(ValueError, match=r"train.text_encoder is none, .* minilm"):
        check_origin(PLAIN, RESOLUTION, reading_bundle("fp32", words("minilm")).spec)
    with pytest.raises(ValueError, match=r"train.degradations is \(\), .* train.degradations=super-resolution,"):
        check_origin(PLAIN, RESOLUTION, restoring_bundle().spec)
    other = reading_bundle("fp32", words("minilm", tokens=3))
    state = build_state(recipe_of(READING), resolution=RESOLUTION, classes=len(CLASSES), device="cpu")
    with pytest.raises(ValueError, match="3 tokens of 4 numbers"):
        warm_start(state, CLASSES, other.spec, other.denoiser)


def test_a_student_is_no_start():
    spec = random_bundle("fp32").spec
    draws = spec.sampling
    lesson = Lesson(teacher="e" * 64, by=draws, student=draws.model_copy(update={"guidance": 1.0, "sampler": "ddim"}))
    with pytest.raises(ValueError, match=r"Start from its teacher: train.init=e{64}"):
        check_origin(PLAIN, RESOLUTION, spec.model_copy(update={"lesson": lesson}))


def test_attention_is_compared_by_level_so_a_network_may_go_to_larger_pictures():
    """At twice the side the same level has maps of twice the side."""
    bundle = random_bundle("fp32")
    recipe = recipe_of({"unet": UNET.model_dump() | {"attention": (16,)}})
    check_origin(recipe, 2 * RESOLUTION, bundle.spec)
    with pytest.raises(ValueError, match="attention=16"):
        check_origin(PLAIN, 2 * RESOLUTION, bundle.spec)


@pytest.mark.parametrize(
    ("change", "first"), [({"channels": 48}, "net.embedding.noise.weight"), ({"blocks": (2, 1)}, "net.down.0.blocks.1")]
)
def test_weights_that_do_not_fit_leave_the_state_as_it_was(change, first):
    bundle = random_bundle("fp32")
    recipe = recipe_of({"unet": UNET.model_dump() | change})
    state = build_state(recipe, resolution=RESOLUTION, classes=len(CLASSES), device="cpu")
    before = {name: weight.clone() for name, weight in state.net.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(first)):
        warm_start(state, CLASSES, bundle.spec, bundle.denoiser)
    assert all(torch.equal(before[name], weight) for name, weight in state.net.named_parameters())
    begun = replace(build_state(PLAIN, resolution=RESOLUTION, classes=3, device="cpu"), images_seen=32)
    with pytest.raises(ValueError, match="has not begun"):
        warm_start(begun, CLASSES, bundle.spec, bundle.denoiser)
