"""Reports: the same numbers give the same bytes, people can read them, a damaged one is refused."""

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation.facts.distance import FloorFacts, Frechet
from diffusion.evaluation.facts.held_out import HeldOutLoss
from diffusion.evaluation.metrics.intervals import digits
from diffusion.evaluation.metrics.sample import Distance
from diffusion.evaluation.metrics.splits import Floor
from diffusion.evaluation.report.plot import loss_plot
from diffusion.evaluation.report.report import class_grid, load_report, publish_report
from diffusion.evaluation.report.words import markdown
from diffusion.recipe import digest_of
from diffusion.store.publish import sha256_file
from diffusion.store.refs import DatasetRef, RunRef
from tests.test_gate import IDENTITY, report

RUN = RunRef(
    uri="runs/1",
    digest="1" * 64,
    recipe_digest="2" * 64,
    images_seen=64_000,
    dataset=DatasetRef(
        uri="datasets/d", digest="d" * 64, resolution=16, classes=("flags", "faces"), images=20, holdout=2, rejected=0
    ),
)
FLOOR = FloorFacts.of(Floor(value=81.23456789, spread=0.5, splits=4, pictures=512, against=1_288))


def rows(seed: int, counts: tuple[int, ...] = (3, 2)) -> list[list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [[generator.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(n)] for n in counts]


def publish(root, value=report()):
    pictures = {name: class_grid(rows(i), value.classes) for i, name in enumerate(("grid", "real"))}
    return publish_report(value, root, run=RUN, bundle_uri="bundles/a", pictures=pictures)


def test_a_published_report_reads_back(tmp_path):
    made = report().model_copy(update={"floor": FLOOR})
    ref = publish(tmp_path, made)
    assert ref.uri == str(tmp_path / "evaluations" / made.digest[:16])
    assert (
        ref.digest
        == made.digest
        == digest_of(made)
        == sha256_file(tmp_path / "evaluations" / ref.digest[:16] / "report.json")
    )
    assert load_report(ref.uri, ref.digest) == made
    assert ref.bundle_digest == made.bundle_digest
    assert {path.name for path in (tmp_path / "evaluations" / ref.digest[:16]).iterdir()} == {
        "report.json",
        "report.md",
        "grid.png",
        "real.png",
        "loss.png",
    }
    for name in ("grid.png", "real.png", "loss.png"):
        assert Image.open(f"{ref.uri}/{name}").convert("RGB").size > (16, 16)


def test_the_same_report_gives_the_same_bytes_and_is_published_once(tmp_path):
    a, b = publish(tmp_path / "a"), publish(tmp_path / "b")
    names = ["report.json", "report.md", "grid.png", "real.png", "loss.png"]
    assert [sha256_file(tmp_path / "a" / "evaluations" / a.digest[:16] / name) for name in names] == [
        sha256_file(tmp_path / "b" / "evaluations" / b.digest[:16] / name) for name in names
    ]
    before = (tmp_path / "a" / "evaluations" / a.digest[:16] / "grid.png").stat().st_mtime_ns
    assert publish(tmp_path / "a") == a
    assert (tmp_path / "a" / "evaluations" / a.digest[:16] / "grid.png").stat().st_mtime_ns == before
    assert len(list((tmp_path / "a" / "evaluations").iterdir())) == 1


def test_a_damaged_or_missing_report_is_refused(tmp_path):
    ref = publish(tmp_path)
    path = tmp_path / "evaluations" / ref.digest[:16] / "report.json"
    path.write_bytes(path.read_bytes().replace(b"100.0", b"1.0"))
    with pytest.raises(ValueError, match="delete its folder and run `diffusion evaluate` again"):
        load_report(ref.uri, ref.digest)
    with pytest.raises(ValueError, match="delete its folder"):
        publish(tmp_path)
    with pytest.raises(ValueError, match="holds no report"):
        load_report(tmp_path)


def test_metrics_are_the_finite_numbers():
    made = report(losses=(0.25, None)).model_copy(update={"floor": FLOOR})
    assert made.metrics() == {
        "frechet": 100.0,
        "frechet_standard_error": 3.0,
        "frechet_low": 94.0,
        "frechet_high": 106.0,
        "frechet_floor": 81.2346,
        "held_out_loss_sigma_1": 0.25,
        "held_out_loss_sigma_1_low": 0.230017,  # by Student's t of 63 degrees
        "held_out_loss_sigma_1_high": 0.269983,
    }
    assert report(None, losses=()).metrics() == {}


def test_the_interval_holds_the_value_and_is_never_negative():
    left_out = tuple(float(i) for i in range(32))
    found = Frechet.of(Distance(10.0, 2.0, left_out), IDENTITY)
    assert found.high - 10 == pytest.approx(2.0395 * 2, rel=1e-3)  # t of 31 degrees at 0.975
    assert found.low == pytest.approx(20 - found.high, rel=1e-4)
    assert Frechet.of(Distance(1.0, 2.0, left_out), IDENTITY).low == 0


@pytest.mark.parametrize(
    ("value", "expected"), [(1 / 3, 0.333333), (123456.7, 123457.0), (float("nan"), None), (float("inf"), None)]
)
def test_digits(value, expected):
    assert digits(value) == expected


def test_markdown_states_numbers_uncertainty_and_identity():
    text = markdown(report(123.456, 2.5).model_copy(update={"floor": FLOOR}))
    for part in ("**123.5** ± 2.5", "95% interval 118.5 to 128.5", "81.23 ± 0.5", "network that answers 0", "a" * 64):
        assert part in text
    assert "(grid.png)" in text
    assert "**Few samples:**" in text  # 512 in 1,280 dimensions
    for name in IDENTITY.extractor.model_dump():
        assert f"| extractor {name} |" in text
    for name in IDENTITY.sampling.model_dump():
        assert f"| sampling {name} |" in text


def test_markdown_of_a_model_without_pictures():
    text = markdown(report(None, losses=(None,), problems=("the network's answer is not finite",)))
    assert "**Problem:** the network's answer is not finite" in text
    assert "| 1 | not finite |" in text
    assert "Not measured: the dataset has no held-out pictures" in markdown(report(losses=()))


def test_grid_has_a_row_for_each_class_and_white_for_missing_pictures():
    values = ((10, 20, 30), (40,))
    pictures = [[np.full((16, 16, 3), (value, 255, 0), np.uint8) for value in row] for row in values]
    image = class_grid(pictures, ("flags", "faces"))
    for value in (10, 20, 30, 40):
        assert (image == (value, 255, 0)).all(axis=2).sum() == 256
    assert class_grid([[], []], ("flags", "faces")).min() < 128  # the names alone
    assert class_grid([[], []], ("flags", "faces")).mean() > 200


def test_plot_shows_the_model_below_the_network_that_answers_0():
    def plot(loss: float | None) -> np.ndarray:
        levels = (HeldOutLoss(sigma=s, loss=loss, standard_error=0.01, zero=1.0, pictures=4) for s in (0.1, 1.0, 10.0))
        return loss_plot(tuple(levels)).astype(int)

    def blue(image: np.ndarray) -> np.ndarray:
        return np.nonzero((image[60:300, :, 2] - image[60:300, :, 0]) > 100)[0]

    def red(image: np.ndarray) -> np.ndarray:
        return np.nonzero((image[40:300, :, 0] - image[40:300, :, 2]) > 100)[0]

    assert blue(plot(0.2)).mean() + 20 > red(plot(0.2)).mean() + 40
    assert len(blue(plot(None))) == 0
    assert loss_plot(()).shape == (360, 640, 3)
