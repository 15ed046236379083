"""The classes one by one: the class that a model fails is the one that stands out, and few pictures claim nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.facts import neighbours
from diffusion.evaluation.facts.by_class import LEAST, LEAST_HELD_OUT, by_class_of, class_words
from diffusion.evaluation.gathered import Gathered, Result, Setup
from diffusion.evaluation.plan import Task
from diffusion.recipe import EvaluateRecipe

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("good", "other", "bad", "rare")
DRAWN, REAL = (40, 40, 40, LEAST - 1), (80, 80, 80, 60)


def gathered(*, losses: bool = True) -> Gathered:
    """Four classes in 12 features, each around a centre of its own; "bad" is drawn around that of "other"."""
    generator = torch.Generator().manual_seed(0)
    centre = 6 * torch.randn(4, 12, generator=generator)

    def around(label: int, n: int) -> torch.Tensor:
        return centre[label] + torch.randn(n, 12, generator=generator)

    labels = np.repeat(np.arange(4), (9, 8, 7, LEAST_HELD_OUT - 1))
    level = {"loss": 0.5 + 0.1 * labels + 0.01 * np.arange(len(labels)), "zero": np.ones(len(labels)), "label": labels}
    results = {0: Result(0, level), 1: Result(1, level | {"loss": 3 * level["loss"]})} if losses else {}
    recipe = EvaluateRecipe(samples=sum(DRAWN))
    extractor = ExtractorIdentity(name="efficientnet-lite0", digest="e" * 64, resolution=32)
    setup = Setup(
        bundle_uri="",
        bundle_digest="b" * 64,
        dataset_uri="",
        dataset_digest="d" * 64,
        recipe=recipe,
        extractor=extractor,
        weights=None,
        device="cpu",
    )
    drawn = [around(1 if label == 2 else label, n) for label, n in enumerate(DRAWN)]
    return Gathered(
        setup=setup,
        manifest=SimpleNamespace(classes=CLASSES, digest="d" * 64),
        spec=SimpleNamespace(text=None),
        draws=(),
        tasks=tuple(Task(number=number, kind="loss", level=number) for number in results),
        results=results,
        compared=(),
        real=torch.cat([around(label, n) for label, n in enumerate(REAL)]),
        real_labels=torch.repeat_interleave(torch.arange(4), torch.tensor(REAL)),
        real_small=torch.empty(0),
        control=None,
        control_labels=torch.empty(0, dtype=torch.int64),
        drawn=torch.cat(drawn),
        drawn_labels=torch.repeat_interleave(torch.arange(4), torch.tensor(DRAWN)),
        thumbnails=None,
        agreement=None,
        problems=(),
    )


def test_the_class_that_fails_stands_out():
    good, other, bad, rare = by_class_of(gathered()).classes
    for one in (good, other):
        assert one.kernel.low < 0 < one.kernel.high
        assert one.coverage.low > 0.5
    assert bad.kernel.low > 10 * good.kernel.high
    assert bad.coverage.value == 0 < bad.coverage.high < 0.2
    assert (rare.kernel, rare.coverage, rare.drawn, rare.training) == (None, None, LEAST - 1, 60)


def test_of_a_large_class_some_are_compared_evenly_spaced_and_it_says_how_many(monkeypatch):
    monkeypatch.setattr(neighbours, "LIMIT", 20)
    classes = by_class_of(gathered()).classes
    assert [(one.drawn, one.training) for one in classes] == [(20, 20)] * 3 + [(LEAST - 1, 20)]
    chosen = neighbours.at_most(torch.zeros(100, 2), torch.arange(30, 70))
    assert chosen.places.tolist() == list(range(30, 70, 2))
    assert classes[2].kernel.low > 10 * classes[0].kernel.high


def test_the_loss_is_a_mean_over_levels_and_pictures_of_the_class():
    good, _, bad, rare = by_class_of(gathered()).classes
    own = 2 * (0.5 + 0.01 * np.arange(9))  # of both levels in the mean
    assert good.held_out == 9
    assert good.loss.value == pytest.approx(own.mean(), rel=1e-5)
    half = 2.306 * own.std(ddof=1) / 3  # t of 8 degrees
    assert (good.loss.high - good.loss.low) / 2 == pytest.approx(half, rel=1e-3)
    assert bad.loss.low > good.loss.high
    assert (rare.held_out, rare.loss) == (LEAST_HELD_OUT - 1, None)
    assert {one.loss for one in by_class_of(gathered(losses=False)).classes} == {None}


def test_words_have_a_row_for_each_class_and_a_dash_for_what_is_not_known():
    title, table, _ = class_words(SimpleNamespace(by_class=by_class_of(gathered())))
    assert title == "## By class"
    assert [row.split(" | ")[0].strip("| ") for row in table.split("\n")[2:]] == list(CLASSES)
    assert table.split("\n")[-1].endswith("| - | - | - |")
    assert class_words(SimpleNamespace(by_class=None)) == []
