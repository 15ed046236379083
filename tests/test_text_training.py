"""Captions in a training step: which are dropped, that what they say is learned, and that the encoder fits the network."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion.data.stream import Batch
from diffusion.random import Stream, uniform
from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.store.text_encoders import encoder_of
from diffusion.training.corrupt import caption_condition, corrupt, dropped_of
from diffusion.training.step import build_state, train_step
from tests.words import TOKENS, WIDTH, install, words

BARE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=(4,)),
    batch_size=16,
    warmup_images=0,
    decay="none",
    precision="fp32",
    label_drop=0.2,
    noise_mean=3.5,  # so much noise that little but the caption tells a plain picture's grey
    noise_std=0.3,
    lr=0.01,
)
RECIPE = BARE.model_validate(
    BARE.model_dump()
    | {"text_encoder": "minilm", "text_tokens": TOKENS, "unet": BARE.unet.model_dump() | {"text_width": WIDTH}}
)
CPU = torch.device("cpu")
ENCODER = words()


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    install(monkeypatch)


def batch_of(captions: list[str], value: Tensor, start: int = 0) -> Batch:
    """Plain grey pictures.  value (b,) uint8."""
    return Batch(
        images=value.view(-1, 1, 1, 1).expand(-1, 3, 8 * 2, 16).contiguous(),
        label=torch.zeros(len(captions), dtype=torch.long),
        captions=captions,
        keys=captions,
        index=torch.arange(start, start + len(captions)),
    )


def test_labels_and_captions_are_dropped_together_and_apart():
    """Shares p + (1 - p) p for each and p + (1 - p) p^2 for both; 5 standard errors."""
    index, p = torch.arange(40_000), 0.2
    label, caption = dropped_of(RECIPE, index)
    for found, expected in (
        (label, p + (1 - p) * p),
        (caption, p + (1 - p) * p),
        (label & caption, p + (1 - p) * p**2),
    ):
        error = (expected * (1 - expected) / len(index)) ** 0.5
        assert abs(found.double().mean().item() - expected) < 5 * error


def test_without_captions_labels_are_dropped_as_ever():
    index = torch.arange(1_000)
    assert torch.equal(dropped_of(BARE, index)[0], uniform(BARE.seed, Stream.LABEL_DROP, index) < BARE.label_drop)


def test_the_condition_of_a_picture_depends_on_its_position_only():
    captions = [f"number {i}" for i in range(12)]
    whole = batch_of(captions, torch.zeros(12, dtype=torch.uint8), start=100)
    dropped = corrupt(whole, RECIPE, 1, CPU).wordless
    cond = caption_condition(whole.captions, dropped, ENCODER)
    rows = [7, 2, 11]
    given = (part for part in whole if part is not None)
    some = Batch(*(part[rows] if isinstance(part, torch.Tensor) else [part[i] for i in rows] for part in given))
    for name, value in caption_condition(some.captions, corrupt(some, RECIPE, 1, CPU).wordless, ENCODER).items():
        assert torch.equal(value, cond[name][rows])
    assert torch.equal(dropped, dropped_of(RECIPE, whole.index)[1])
    assert 0 < dropped.sum() < 12
    assert torch.equal(~cond["text_mask"].any(1), dropped)
    assert torch.equal(corrupt(whole, RECIPE, 1, CPU).label == 1, dropped_of(RECIPE, whole.index)[0])


def test_what_a_caption_says_is_learned_and_no_caption_is_in_between():
    """Dark and bright pictures under one label, -0.5 and 0.5 as a network sees them."""
    state = build_state(RECIPE, resolution=16, classes=1, device=CPU)
    dark = torch.arange(RECIPE.batch_size) % 2 == 0
    captions = ["a dark square" if d else "a bright square" for d in dark]
    value = torch.where(dark, 64, 191).to(torch.uint8)
    for _ in range(60):
        train_step(state, batch_of(captions, value, state.images_seen), RECIPE)
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = 30 * (noise - noise.mean()).expand(3, -1, -1, -1)
    asked = ENCODER(["a dark square", "", "a bright square"])
    with torch.no_grad():
        answer = state.net.eval()(x, torch.full((3,), 30.0), **asked._asdict()).mean(dim=(1, 2, 3))
    told_dark, untold, told_bright = answer.tolist()
    assert told_dark == pytest.approx(-0.5, abs=0.2)
    assert told_bright == pytest.approx(0.5, abs=0.2)
    assert told_dark + 0.2 < untold < told_bright - 0.2


def test_the_encoder_must_fit_the_network(monkeypatch):
    monkeypatch.undo()
    assert encoder_of(BARE) is None
    with pytest.raises(ValueError, match=r"set train\.unet\.text_width=384"):
        encoder_of(RECIPE)
    fitting = RECIPE.model_copy(update={"unet": RECIPE.unet.model_copy(update={"text_width": 384}), "text_tokens": 9})
    encoder = encoder_of(fitting)
    assert encoder.identity.tokens == 9
    assert torch.equal(encoder(["a flag"]).text, replace(encoder, embed=encoder.embed.__wrapped__)(["a flag"]).text)
