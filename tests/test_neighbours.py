"""What the report says of nearest neighbours and of the kernel distance: values, intervals, identity, words."""

from types import SimpleNamespace

import pytest
import torch

from diffusion.evaluation.facts import neighbours
from diffusion.evaluation.facts.neighbours import kernel_of, neighbour_words, neighbours_of
from diffusion.evaluation.plan import evenly
from diffusion.recipe import EvaluateRecipe
from tests.metrics_by_hand import kernel_by_hand, neighbourhood_by_hand
from tests.test_gate import IDENTITY, report

pytestmark = pytest.mark.usefixtures("one_thread")


def gathered(drawn: torch.Tensor | None, real: torch.Tensor) -> SimpleNamespace:
    """What these numbers take of what an evaluation gathers."""
    return SimpleNamespace(
        recipe=EvaluateRecipe(),
        manifest=SimpleNamespace(digest="d" * 64),
        spec=SimpleNamespace(text=None),
        setup=SimpleNamespace(extractor=IDENTITY.extractor),
        drawn=drawn,
        real=real,
        drawn_labels=torch.zeros(0 if drawn is None else len(drawn), dtype=torch.int64),
        real_labels=torch.arange(len(real)) // 20,
    )


@pytest.fixture
def pictures() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(3)
    return gathered(torch.randn(40, 6, generator=generator) + 0.3, torch.randn(60, 6, generator=generator))


def test_values_intervals_and_identity(pictures):
    kernel, found = kernel_of(pictures), neighbours_of(pictures)
    drawn, real = pictures.drawn.double().numpy(), pictures.real.double().numpy()
    assert kernel.value == pytest.approx(kernel_by_hand(drawn, real), rel=1e-5)
    assert kernel.low < kernel.value < kernel.high
    assert len(kernel.left_out) == 20
    expected = neighbourhood_by_hand(drawn, real)
    for name, each in found.measured.items():
        assert each.value == pytest.approx(expected[name], rel=1e-5)
        assert each.low < each.value < each.high
        assert 0.5 < each.real < 1.5
    assert (found.real_pictures, found.real_against) == (30, 30)
    for facts, metric in ((kernel, "kernel/1"), (found, "neighbours/1")):
        assert facts.identity == IDENTITY.model_copy(
            update={"metric": metric, "samples": 40, "reference_pictures": 60, "dimensions": 6}
        )


def test_of_many_pictures_some_are_looked_at_and_the_identity_says_so(pictures, monkeypatch):
    monkeypatch.setattr(neighbours, "LIMIT", 30)
    kernel, found = kernel_of(pictures), neighbours_of(pictures)
    some = gathered(pictures.drawn[list(evenly(40, 30))], pictures.real[::2])
    assert kernel.value == kernel_of(some).value
    assert found.coverage.value == neighbours_of(some).coverage.value
    assert (found.identity.samples, found.identity.reference_pictures) == (30, 30)


def test_without_pictures_or_with_too_few_nothing_is_measured(pictures):
    for other in (gathered(None, pictures.real), gathered(pictures.drawn[:15], pictures.real)):
        assert kernel_of(other) is None
        assert neighbours_of(other) is None
    least = gathered(pictures.drawn[:16], pictures.real[:16])
    assert neighbours_of(least).identity.samples == 16


def test_words_and_metrics_have_each_number_with_its_interval(pictures):
    made = report().model_copy(update={"kernel": kernel_of(pictures), "neighbours": neighbours_of(pictures)})
    text = "\n".join(neighbour_words(made))
    metrics = made.metrics()
    for name, each in made.neighbours.measured.items():
        assert f"| {name} | **{each.value:.3f}** | {each.low:.3f} to {each.high:.3f} | {each.real:.3f} |" in text
        assert [metrics[f"{name}{end}"] for end in ("", "_low", "_high", "_real")] == [
            each.value,
            each.low,
            each.high,
            each.real,
        ]
    assert f"| kernel distance | **{made.kernel.value:.4g}** |" in text
    assert metrics["kernel_low"] == made.kernel.low
    title, why = neighbour_words(report())
    assert title == neighbour_words(made)[0]
    assert why == "Not measured: it takes 16 drawn and 16 training pictures (`evaluate.samples`)."
    assert "gave no pictures" in neighbour_words(report(None, problems=("not finite",)))[1]
