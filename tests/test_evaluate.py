"""An evaluation in one process, on a real run: what is drawn, what is measured, what stays the same."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.data.reader import ShardReader
from diffusion.denoiser import EDM
from diffusion.evaluation import reference
from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.facts.held_out import held_out_loss
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.identity import differences, flat
from diffusion.evaluation.measure import evaluate, evaluate_bundle, in_process
from diffusion.evaluation.plan import draws, evenly, tasks
from diffusion.evaluation.report.report import load_report
from diffusion.evaluation.worker import Worker
from diffusion.recipe import EvaluateRecipe, GateRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest
from diffusion.store.bundle import load_bundle
from diffusion.store.publish import sha256_file
from diffusion.threads import one_thread
from tests.evaluated_run import make_run

COUNTS = (5, 0, 11)
RECIPE = EvaluateRecipe(samples=16, batch_size=4, grid_columns=3, loss_levels=(0.5, 5.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def run(emoji_folder, tiny_recipe, root):
    return make_run(emoji_folder, tiny_recipe, root)


@pytest.fixture(scope="module")
def evaluated(run, tiny_recipe, root):
    seen = []
    ref = evaluate(run, tiny_recipe.evaluate, root, progress=lambda done, total: seen.append((done, total)))
    return ref, seen


def test_a_bundle_is_measured_as_its_run_is(evaluated, run, tiny_recipe, root, tmp_path):
    ref, _ = evaluated
    found = evaluate_bundle((ref.bundle_uri, ref.bundle_digest), run.dataset, tiny_recipe.evaluate, tmp_path)
    assert found.digest == ref.digest
    assert {path.name for path in Path(found.uri).iterdir()} == {path.name for path in Path(ref.uri).iterdir()}


def test_labels_follow_the_data_and_the_grid_has_its_columns():
    plan = draws(COUNTS, RECIPE)
    assert [sum(d.measured and d.label == c for d in plan) for c in range(3)] == [5, 0, 11]
    assert [sum(d.shown and d.label == c for d in plan) for c in range(3)] == [3, 3, 3]
    assert sorted(plan) == plan  # by class: the jackknife's blocks then have the classes in proportion


def test_a_picture_does_not_depend_on_how_many_are_drawn():
    few = {(d.label, d.ordinal): d.seed for d in draws(COUNTS, RECIPE)}
    many = {(d.label, d.ordinal): d.seed for d in draws(COUNTS, RECIPE.model_copy(update={"samples": 200}))}
    assert few.items() <= many.items()
    assert len(set(many.values())) == len(many)
    other = {(d.label, d.ordinal): d.seed for d in draws(COUNTS, RECIPE.model_copy(update={"seed": 1}))}
    assert not set(few.values()) & set(other.values())


def test_tasks_hold_every_piece_of_work_once():
    plan = draws(COUNTS, RECIPE)
    work = tasks(plan, RECIPE, real={"train": tuple(range(300)), "holdout": tuple(range(9))}, holdout=9)
    assert [task.number for task in work] == list(range(len(work)))
    assert [draw for task in work for draw in task.draws] == plan
    for what, pictures in ((("real", "train"), 300), (("real", "holdout"), 9), (("bound", "train"), 9)):
        assert [i for task in work if (task.kind, task.split) == what for i in task.indices] == list(range(pictures))
    assert [task.level for task in work if task.kind == "loss"] == [0, 1]
    assert max(len(task.draws) for task in work) == RECIPE.batch_size
    assert {task.kind for task in tasks(plan, RECIPE, real={}, holdout=0)} == {"draw"}
    given = tasks(plan, RECIPE, real={}, holdout=11, cases=("inpainting", "colorization"))
    for case in ("inpainting", "colorization"):
        assert [i for task in given if task.case == case for i in task.indices] == list(range(11))
    none = RECIPE.model_copy(update={"restoration_pictures": 0})
    assert "restore" not in {task.kind for task in tasks(plan, none, real={}, holdout=9, cases=("inpainting",))}
    unbound = RECIPE.model_copy(update={"bound_steps": 0})
    assert {task.kind for task in tasks(plan, unbound, real={}, holdout=9)} == {"draw", "loss"}


def test_evenly():
    assert evenly(10, 5) == (0, 2, 4, 6, 8)
    assert evenly(3, 5) == (0, 1, 2)
    assert evenly(1_000, 7)[-1] < 1_000


def test_the_loss_of_a_network_that_answers_0_is_1_where_the_data_says_so():
    """x0 ~ N(0, sigma_data^2) pixel by pixel: 1 at every noise level, within the stated error."""

    class AnswersZero(torch.nn.Module):
        sigma_data = 0.5

        def forward(self, x, sigma, label):
            return EDM(0.5).c_skip(sigma.view(-1, 1, 1, 1)) * x

    x0 = 0.5 * torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recipe = RECIPE.model_copy(update={"loss_levels": (0.05, 0.5, 20.0)})
    for level in range(3):
        found = held_out_loss(
            AnswersZero(), x0, {"label": torch.zeros(24, dtype=torch.int64)}, level=level, recipe=recipe
        )
        error = found["loss"].std(ddof=1) / np.sqrt(24)
        assert abs(found["loss"].mean() - 1) < 4 * error < 0.05
        assert np.array_equal(found["loss"], found["zero"])


def test_the_loss_of_a_perfect_answer_is_0():
    class Knows(torch.nn.Module):
        sigma_data = 0.5

        def forward(self, x, sigma, label):
            return torch.zeros_like(x)

    found = held_out_loss(Knows(), torch.zeros(3, 3, 8, 8), {"label": torch.zeros(3).long()}, level=0, recipe=RECIPE)
    assert not found["loss"].any()
    assert found["zero"].all()


def stated(page: str) -> dict[str, set[str]]:
    """What a report's page says of the identity of each number, as "name value"."""
    first, *others = page.split("## Identity of the numbers\n\n")[1].strip().split("\n\n")
    above = {name.replace("dataset", "dataset_digest"): value for name, value in cells(first)}
    found = {}
    for table in others:
        rows = dict(cells(table))
        same = rows.pop("as above", "").split(", ")
        again = [name for name in above if name.partition(" ")[0] in same]
        numbers = {name.strip("*"): rows.pop(name) for name in list(rows) if name.startswith("**")}
        shared = rows | {name: above[name] for name in again}
        above |= shared
        for number, own in numbers.items():
            found[number] = {*(f"{name} {value}" for name, value in shared.items()), *filter(None, own.split("; "))}
    return found


def cells(table: str) -> list[tuple[str, str]]:
    return [tuple(row.strip("| ").split(" | ", 1)) for row in table.splitlines()[2:]]


def test_a_report_says_the_identity_of_every_number_and_what_they_share_once(evaluated):
    report = load_report(evaluated[0].uri)
    page = Path(evaluated[0].uri, "report.md").read_text()
    said = stated(page)
    numbers = {
        "Frechet distance": report.frechet,
        "kernel distance": report.kernel,
        "precision, recall, density, coverage": report.neighbours,
        "each class by itself": report.by_class,
        "copies of training pictures": report.memorization,
        "variational bound": report.bound,
    } | {task.identity.case: task for task in report.restoration}
    assert {name for name in said if name not in numbers} == {
        "held-out loss",
        "Frechet distance of real pictures",
        "precision, recall, density, coverage of real pictures",
    }
    for name, number in numbers.items():
        facts = flat(number.identity.model_dump())
        assert said[name] == {f"{k.removeprefix('sample.').replace('.', ' ')} {v}" for k, v in facts.items()}
    assert f"pictures {report.held_out[0].pictures}" in said["held-out loss"]
    identity = page.split("## Identity of the numbers")[1]
    assert identity.count(report.dataset_digest) == identity.count(report.frechet.identity.extractor.digest) == 1


def test_a_report_has_every_number(evaluated, run, tiny_recipe):
    ref, seen = evaluated
    report = load_report(ref.uri, ref.digest)
    assert report.run_digest == run.digest
    assert report.bundle_digest == ref.bundle_digest
    assert report.frechet.identity.samples == 16
    assert report.frechet.low <= report.frechet.value <= report.frechet.high
    assert report.floor.pictures == 16
    assert report.floor.value < report.frechet.value  # the pictures are noise
    assert [level.sigma for level in report.held_out] == list(tiny_recipe.evaluate.loss_levels)
    assert all(0 < level.loss < 5 for level in report.held_out)
    assert report.memorization.identity.held_out_pictures == run.dataset.holdout
    assert report.memorization.identity.sample.reference_pictures == run.dataset.images
    assert report.memorization.low == 0  # noise is near to nothing
    assert len(report.memorization.pairs) == tiny_recipe.evaluate.nearest_pairs
    assert report.text is None
    assert "caption" not in Path(ref.uri, "report.json").read_text()
    assert report.bound.identity.pictures == tiny_recipe.evaluate.loss_pictures
    assert report.bound.identity.dataset_digest == report.dataset_digest
    assert report.bound.low < report.bound.value < report.bound.high < 16
    assert set(ref.metrics) >= {"frechet", "frechet_floor", "kernel", "precision", "recall", "density", "coverage"}
    assert set(ref.metrics) >= {"held_out_loss_sigma_0.1", "bound_bits"}
    assert verdict(report, None, tiny_recipe.gate).passed
    assert not verdict(report, None, GateRecipe(max_loss=1e-3)).passed
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] >= 16


def test_a_model_that_gives_training_pictures_is_found_out(run, tiny_recipe, root):
    """Each drawn picture replaced by a training picture, a little noisier, as its worker then measures it."""
    reader = ShardReader(run.dataset.uri, digest=run.dataset.digest)

    def each(setup, work):
        worker, place, noise = Worker(setup), 0, np.random.default_rng(0)
        for task in work:
            result = worker(task)
            if measured := [draw for draw in task.draws if draw.measured]:
                copied = reader.gather(np.arange(place, place + len(measured))).images
                place += len(measured)
                noisy = (copied + noise.normal(0, 4, copied.shape)).clip(0, 255).round().astype(np.uint8)
                with one_thread():
                    result = replace(result, arrays=result.arrays | worker.measured(noisy))
            yield result

    ref = evaluate(run, tiny_recipe.evaluate, root, each=each)
    found = load_report(ref.uri, ref.digest).memorization
    assert found.near == found.identity.sample.samples == 16
    assert 0.4 < found.low < found.share == found.high == 1
    assert [pair.picture for pair in found.pairs] == [pair.training for pair in found.pairs]
    assert [pair.key for pair in found.pairs] == [reader.keys[pair.training] for pair in found.pairs]
    pairs = np.array(Image.open(Path(ref.uri, "nearest.png")).convert("RGB"))
    for n in range(4):  # of the first row: drawn left, the training picture right
        left = 12 + n * 206
        drawn, training = (pairs[30:126:3, at : at + 96 : 3].astype(float) for at in (left, left + 98))
        assert np.array_equal(training, reader.read(found.pairs[n].training).image)
        assert 1 < np.abs(drawn - training).mean() < 5
    assert "copies" in Path(ref.uri, "report.md").read_text()


def test_again_is_the_same_report_from_kept_features(evaluated, run, tiny_recipe, root):
    kept = list((root / "features").iterdir())
    assert len(kept) == 4  # features and small copies, of training and of held-out pictures
    kinds = []

    def each(setup, work):
        kinds.extend(task.kind for task in work)
        return in_process(setup, work)

    assert evaluate(run, tiny_recipe.evaluate, root, each=each) == evaluated[0]
    assert set(kinds) == {"loss", "bound", "restore", "draw"}
    assert list((root / "features").iterdir()) == kept


def test_pictures_are_those_the_engine_serves(evaluated, tiny_recipe):
    """Drawn here in another order and with other slots, compared with what stands in the grid."""
    ref, _ = evaluated
    bundle = load_bundle(ref.bundle_uri, digest=ref.bundle_digest)
    columns, size, gap = tiny_recipe.evaluate.grid_columns, bundle.spec.resolution, 2
    shown = [draw for draw in draws((1, 1, 1), tiny_recipe.evaluate) if draw.shown]  # whatever the frequencies are
    requests = [GenerateRequest(label=bundle.spec.classes[draw.label], seed=draw.seed) for draw in shown]
    with one_thread():
        served = Engine(bundle, slots=3).generate(requests[::-1])[::-1]
    grid = np.array(Image.open(Path(ref.uri, "grid.png")).convert("RGB"))
    for draw, (picture,) in zip(shown, served, strict=True):
        top, left = gap + draw.label * (size + gap), grid.shape[1] - (columns - draw.ordinal) * (size + gap)
        assert np.array_equal(grid[top : top + size, left : left + size], picture)


def test_a_diverged_model_gets_a_report_and_is_refused(emoji_folder, tiny_recipe, tmp_path):
    poisoned = make_run(emoji_folder, tiny_recipe, tmp_path, poison=True)
    ref = evaluate(poisoned, tiny_recipe.evaluate, tmp_path)
    report = load_report(ref.uri)
    assert report.frechet is None
    assert report.problems
    assert all(level.loss is None for level in report.held_out)
    assert report.bound.value is None
    found = verdict(report, None, tiny_recipe.gate)
    assert not found.passed
    assert len(found.reasons) >= 2 + len(report.held_out)


def test_any_average_and_a_guide_are_measured_without_training_again(emoji_folder, tiny_recipe, root):
    train = tiny_recipe.train.model_copy(update={"checkpoint_images": 8})
    run = make_run(emoji_folder, tiny_recipe.model_copy(update={"train": train}), root)
    autoguided = tiny_recipe.evaluate.sampling.model_copy(update={"guidance_kind": "autoguidance"})
    changes = {"ema": 0.07, "guide_images": 8, "guide_ema": 0.05, "sampling": autoguided}
    recipe = EvaluateRecipe(**dict(tiny_recipe.evaluate) | changes)
    ref = evaluate(run, recipe, root)
    report, said = load_report(ref.uri, ref.digest), Path(ref.uri, "report.md").read_text()
    spec = load_bundle(ref.bundle_uri, digest=ref.bundle_digest).spec
    assert (report.reconstruction, report.guide) == (spec.reconstruction, spec.guide)
    assert [source.images_seen for source in report.reconstruction.checkpoints] == [8, run.images_seen]
    assert report.frechet.identity.sampling.guidance_kind == "autoguidance"
    error = f"{report.reconstruction.error:.2%} of its profile is missed"
    assert f"average of relative width 0.07, put together from 2 checkpoints ({error})" in said
    assert "Its guide is the same run at 8 images, average of relative width 0.05." in said
    assert all(source.digest in said for source in (*report.reconstruction.checkpoints, report.guide.checkpoint))
    assert evaluate(run, recipe, root) == ref
    plain = evaluate(run, tiny_recipe.evaluate, root)
    assert not {"reconstruction", "guide"} & load_report(plain.uri).model_dump().keys()
    early = evaluate(run, tiny_recipe.evaluate.model_copy(update={"images": 8}), root)
    distances = [load_report(each.uri).frechet for each in (early, plain)]
    assert differences(*(distance.identity for distance in distances)) == ()  # the gate compares the two
    assert (early.run.images_seen, load_report(early.uri).images_seen) == (8, 8)
    assert load_report(early.uri).run_digest == early.run.digest == sha256_file(Path(early.run.uri, "manifest.json"))
    served = load_file(Path(early.bundle_uri, "weights.safetensors"))
    kept = load_file(Path(run.uri).with_name(f"{8:012d}") / f"ema-{tiny_recipe.evaluate.ema}.safetensors")
    assert served.keys() == kept.keys()
    assert all(torch.equal(served[name], kept[name]) for name in kept)


def test_kept_features_are_never_another_identitys(tmp_path):
    extractor = ExtractorIdentity(name="efficientnet-lite0", digest="e" * 64, resolution=64)
    identity = reference.ReferenceIdentity(
        dataset_digest="d" * 64, pictures=3, extractor=extractor, torch="2", device="cpu"
    )
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert reference.recall(tmp_path, identity) is None
    path = reference.remember(tmp_path, identity, features)
    assert np.array_equal(reference.recall(tmp_path, identity), features)
    other = identity.model_copy(update={"extractor": extractor.model_copy(update={"resolution": 96})})
    assert reference.recall(tmp_path, other) is None
    path.rename(reference.path_of(tmp_path, other))
    with pytest.raises(ValueError, match="not what its name says: delete this file"):
        reference.recall(tmp_path, other)
    path = reference.remember(tmp_path, identity, features)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="not what its name says"):
        reference.recall(tmp_path, identity)
    path.write_bytes(bytes(data[:40]))
    with pytest.raises(ValueError, match="is damaged"):
        reference.recall(tmp_path, identity)
