"""Restoration in the report: the pictures are those of `diffusion restore`, the numbers right, the intervals honest."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.images import to_model, to_uint8
from diffusion.data.reader import ShardReader
from diffusion.evaluation.facts.restoration import Restoration, of_mean, of_median, restoration_of
from diffusion.evaluation.measure import evaluate
from diffusion.evaluation.plan import evenly
from diffusion.evaluation.report.report import load_report
from diffusion.evaluation.restoration import EXACT, case_of, cases_for, fidelity, restored
from diffusion.operators import BlockMean
from diffusion.recipe import EvaluateRecipe
from diffusion.sampler import run
from diffusion.serving.engine import Engine
from diffusion.serving.request import GenerateRequest, resolve
from diffusion.serving.restoring import REPEATS, by_training, by_zero_shot
from diffusion.store.bundle import load_bundle
from diffusion.store.refs import RunRef
from diffusion.threads import one_thread
from tests.evaluated_run import make_run
from tests.random_bundle import RESOLUTION, guided_bundle, random_bundle, restoring_bundle, shaped_bundle

TASKS = ("super-resolution x2", "super-resolution x4", "super-resolution x8", "inpainting", "colorization")


@pytest.fixture(scope="module")
def evaluated(emoji_folder, tiny_recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    run_ref = make_run(emoji_folder, tiny_recipe, root)
    recipe = EvaluateRecipe(**dict(tiny_recipe.evaluate) | {"restoration_pictures": 9})
    return run_ref, recipe, evaluate(run_ref, recipe, root)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 3, R, R) in [-1, 1]."""
    values = np.random.default_rng(seed).integers(0, 256, (n, RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    return to_model(torch.from_numpy(values))


def looked_at(run: RunRef) -> tuple[ShardReader, np.ndarray]:
    """The held-out pictures, and the nine of them that an evaluation looks at, uint8 (9, H, W, 3)."""
    reader = ShardReader(run.dataset.uri, "holdout", digest=run.dataset.digest)
    return reader, reader.gather(np.array(evenly(len(reader), 9))).images


def flat(views: np.ndarray) -> np.ndarray:
    return views.reshape(len(views), -1).astype(np.float32)


@pytest.mark.parametrize("bundle", [random_bundle("fp32"), restoring_bundle(("inpainting",)), guided_bundle("fp32")])
def test_a_picture_is_restored_to_the_bits_of_the_command(bundle):
    """Picture number i, here, is the i-th that `diffusion restore --seed` gives of the same measurement."""
    with one_thread():
        engine = Engine(bundle, slots=4)
        number = 2
        for name in ("super-resolution x4", "inpainting"):
            case, x0 = case_of(name, (RESOLUTION, RESOLUTION)), pictures(2)
            cond = {"label": torch.tensor([0, 1])}
            found = restored(engine, case, x0, cond, torch.tensor([0, number]), seed=7)["restored"]
            trained = case.task in bundle.spec.degradations
            steps = 2 if trained else bundle.spec.sampling.steps
            asked = GenerateRequest(label=bundle.spec.classes[1], seed=7, n=number + 1, guidance=1.0, steps=steps)
            y = case.operator.forward(x0[1:])
            given = (resolve(asked, bundle.spec), case.operator, y, bundle, engine.device)
            way = by_training(*given) if trained else by_zero_shot(*given, noise=0.0, repeats=REPEATS)
            with torch.no_grad():
                expected = run(way(range(number + 1)), engine.denoise)[number]
            assert torch.equal(found[1], expected)


def test_a_model_that_knows_the_truth_restores_it_and_the_numbers_say_so():
    x0 = pictures(3)
    bundle = random_bundle("fp32")
    knowing = SimpleNamespace(
        bundle=bundle, device=torch.device("cpu"), denoise=lambda x, sigma, **cond: x0[cond["label"]]
    )
    for name in TASKS:
        case = case_of(name, (RESOLUTION, RESOLUTION))
        made = restored(knowing, case, x0, {"label": torch.arange(3)}, torch.arange(3), seed=0)
        found = fidelity(case, made, x0, flat)
        assert (found["psnr"] == EXACT).all()
        assert np.allclose(found["ssim"], 1)
        assert (found["distance"] == 0).all()
        assert found["consistency"].max() < 1e-5
        assert found["guess_psnr"].max() < 20
        error = (to_uint8(made["guess"]).double() - to_uint8(x0).double()).square().flatten(1).mean(dim=1)
        assert np.allclose(found["guess_psnr"], 10 * np.log10(255**2 / error.numpy()))
        assert np.allclose(found["guess_distance"], (error * 3 * RESOLUTION**2).sqrt())


def test_what_is_not_finite_has_no_numbers():
    x0 = pictures(2)
    broken = x0.clone()
    broken[1, 0, 0, 0] = torch.nan
    case = case_of("colorization", (RESOLUTION, RESOLUTION))
    found = fidelity(case, {"restored": broken, "guess": x0, "y": x0[:, :1]}, x0, flat)
    assert [np.isnan(values).tolist() for values in found.values()] == 4 * [[False, True]] + 4 * [[False, False]]
    assert np.isnan(of_mean(found["ssim"])).all()
    assert np.isnan(of_median(found["psnr"])).all()


def test_the_tasks_are_those_that_the_model_can_do():
    assert cases_for(random_bundle().spec) == TASKS
    sizes = shaped_bundle(((12, 20), (16, 16))).spec
    assert cases_for(sizes) == ("super-resolution x2", "super-resolution x4", "inpainting", "colorization")
    keep = case_of("inpainting", (12, 20)).operator.keep
    assert (~keep).sum() == 3 * 6 * 10


@pytest.mark.parametrize(("interval", "middle"), [(of_mean, 1.0), (of_median, np.log(2))])
def test_the_interval_covers_as_often_as_it_says(interval, middle):
    """Of exponential numbers, far from normal: 95 % for the median by its construction, a little less for the mean."""
    drawn = np.random.default_rng(0).exponential(size=(2_000, 30))
    found = np.array([interval(values) for values in drawn])
    covered = ((found[:, 1] <= middle) & (middle <= found[:, 2])).mean()
    assert 0.91 < covered < 0.98
    assert np.isnan(of_median(np.arange(5.0))[1])  # 1 in 16 such intervals would miss: too often
    assert of_median(np.arange(6.0)) == (2.5, 0.0, 5.0)


def test_the_report_has_each_task_with_its_identity(evaluated):
    run_ref, _, ref = evaluated
    report, said = load_report(ref.uri, ref.digest), Path(ref.uri, "report.md").read_text()
    _, true = looked_at(run_ref)
    coloured = int((true.max(axis=3) > true.min(axis=3)).any(axis=(1, 2)).sum())
    assert 6 <= coloured < 9
    assert [found.identity.case for found in report.restoration] == list(TASKS)
    for found in report.restoration:
        assert found.identity.dataset_digest == run_ref.dataset.digest
        assert (found.identity.way, found.identity.repeats) == ("zero-shot", REPEATS)
        assert found.identity.pictures == (coloured if found.identity.which else 9)
        assert found.psnr_low <= found.psnr <= found.psnr_high
        assert found.gain_low <= found.gain <= found.gain_high
        assert found.consistency < 1e-4
        assert f"**{found.identity.case}**" in said
        name = f"restoration_{found.identity.case.replace(' ', '_').replace('-', '_')}"
        for number in ("psnr", "gain", "ssim", "distance"):
            for end in ("", "_low", "_high"):
                assert ref.metrics[f"{name}_{number}{end}"] == getattr(found, f"{number}{end}")
    assert f"Of colorization the {coloured} of 9 are meant that have colour." in said
    shown = np.array(Image.open(Path(ref.uri, "restoration.png")).convert("RGB"))
    assert shown.shape[0] == 2 + 11 * 34
    assert (report.restoration[0].guess.name, report.restoration[3].guess.name) == ("bicubic", "grey")


def test_an_interval_of_a_mean_ends_where_its_range_does(evaluated):
    _, _, ref = evaluated
    identity = load_report(ref.uri).restoration[0].identity
    figures = {name: np.array([0.1, 1.0, 0.2]) for name in ("psnr", "ssim", "distance", "consistency")}
    figures |= {f"guess_{name}": values for name, values in figures.items()}
    assert of_mean(figures["ssim"])[1] < 0
    assert of_mean(figures["ssim"])[2] > 1
    found = Restoration.of(figures, case_of(identity.case, (RESOLUTION, RESOLUTION)), identity)
    assert -1 < found.ssim_low < 0
    assert found.ssim_high == 1
    assert found.distance_low == 0
    assert found.distance_high > 1
    lower = Restoration.of(
        figures | {"ssim": -figures["ssim"]}, case_of(identity.case, (RESOLUTION, RESOLUTION)), identity
    )
    assert lower.ssim_low == -1


def test_the_numbers_are_those_of_the_held_out_pictures(evaluated, tiny_recipe):
    """By one's own way: read, made small, enlarged without a model, compared."""
    run_ref, recipe, ref = evaluated
    report = load_report(ref.uri)
    reader, true = looked_at(run_ref)
    small = BlockMean(4).forward(to_model(torch.from_numpy(true)))
    large = torch.nn.functional.interpolate(small, scale_factor=4, mode="bicubic")
    error = (to_uint8(large).double() - torch.from_numpy(true).double()).square().flatten(1).mean(dim=1)
    expected = np.median(10 * np.log10(255**2 / error.numpy()))
    assert report.restoration[1].guess.psnr == pytest.approx(expected, rel=1e-5)
    engine = Engine(load_bundle(ref.bundle_uri), slots=recipe.batch_size)
    labels = torch.from_numpy(reader.labels[list(evenly(len(reader), 9))])
    case, x0 = case_of(TASKS[1], true.shape[1:3]), to_model(torch.from_numpy(true))
    with one_thread():
        made = restored(engine, case, x0, {"label": labels}, torch.arange(9), seed=recipe.seed)
    found = fidelity(case, made, x0, flat)
    assert report.restoration[1].psnr == pytest.approx(np.median(found["psnr"]), rel=1e-5)


def test_grey_pictures_are_not_coloured(evaluated):
    """Where the grey is the truth there is nothing to gain, and a model would only lose."""
    run_ref, recipe, ref = evaluated
    extractor = load_report(ref.uri).restoration[0].identity.extractor
    setup = SimpleNamespace(extractor=extractor)
    guess = np.array([EXACT, EXACT, 20.0])

    def facts(guess: np.ndarray, name: str = "colorization") -> tuple[Restoration, ...]:
        task = SimpleNamespace(case=name)
        names = ("psnr", "ssim", "distance", "consistency")
        arrays = {f"{prefix}{name}": np.full(len(guess), 30.0) for prefix in ("", "guess_") for name in names}
        results = [(task, SimpleNamespace(arrays=arrays | {"guess_psnr": guess}))]
        return restoration_of(
            SimpleNamespace(
                problems=(),
                of=lambda kind: results,
                spec=load_bundle(ref.bundle_uri).spec,
                setup=setup,
                manifest=SimpleNamespace(digest=run_ref.dataset.digest),
                recipe=recipe,
            )
        )

    assert facts(guess[:2]) == ()
    (found,) = facts(guess)
    assert (found.gain, found.guess.psnr, found.psnr_low) == (10.0, 20.0, None)
    assert (found.identity.pictures, found.identity.which) == (1, "those that have colour")
    (found,) = facts(guess, "inpainting")  # what a plain picture is to a model counts elsewhere
    assert (found.gain, found.identity.pictures, found.identity.which) == (30.0 - EXACT, 3, None)
