"""From a dataset in aspect buckets to its pictures: training resumed and divided, measuring, drawing at any size."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.data import ingest
from diffusion.data.images import grid, to_model
from diffusion.data.reader import ShardReader
from diffusion.evaluation import worker
from diffusion.evaluation.facts.held_out import held_out_loss
from diffusion.evaluation.measure import evaluate, in_process
from diffusion.evaluation.plan import draws, evenly
from diffusion.evaluation.report.report import load_report
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import read_receipt, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, RequestError, resolve
from diffusion.serving.ticket import DrawingFailed
from diffusion.store.bundle import load_bundle
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.step import TrainState, check_sizes
from diffusion.unet import UNet
from tests.evaluated_run import make_run
from tests.joined import in_processes
from tests.random_bundle import random_bundle, random_spec, shaped_bundle
from tests.running_engine import running
from tests.shapes import RECIPE, SIZES, write
from tests.test_loop import EXACT, _process, fresh, learned, run, vector, without_clocks
from tests.test_loop import RECIPE as TRAIN
from tests.test_step import bits_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> DatasetRef:
    source = write(tmp_path_factory.mktemp("shapes"))
    return ingest.shard_dataset(source, RECIPE, tmp_path_factory.mktemp("root"))


# training


def test_resumed_is_uninterrupted_bit_for_bit(dataset, tmp_path):
    facts = checkpoint.facts_of(TRAIN, dataset, world=1, device=torch.device("cpu"))

    def save(state: TrainState) -> None:
        checkpoint.save(state, checkpoint.folder_of(tmp_path, state.images_seen), facts)

    whole, resumed = fresh(TRAIN), fresh(TRAIN)
    records = run(dataset, whole, TRAIN, on_checkpoint=save)
    assert checkpoint.load(checkpoint.folder_of(tmp_path, 48), resumed, facts) == {}
    rest = run(dataset, resumed, TRAIN)
    assert bits_of(resumed) == bits_of(whole)
    assert without_clocks(rest) == without_clocks([record for record in records if record["images_seen"] > 48])


def test_the_number_of_processes_changes_no_number(dataset, tmp_path):
    """And resumed in two they have the bits of what went on in two, which each of the processes asserts."""
    recipe = EXACT.model_copy(update={"degradations": (), "images": 60, "checkpoint_images": 24})
    in_processes(2, _process, 2, str(tmp_path / "rendezvous"), dataset, str(tmp_path), recipe)
    before, alone = fresh(recipe), fresh(recipe)
    run(dataset, alone, recipe)
    moved = (vector(learned(alone)) - vector(learned(before))).norm()
    for rank in range(2):
        assert (vector(load_file(tmp_path / f"{rank}.safetensors")) - vector(learned(alone))).norm() < 1e-3 * moved


def test_what_the_network_cannot_read_is_refused(dataset):
    check_sizes(TRAIN, dataset)
    deep = TRAIN.unet.model_copy(update={"multipliers": (1, 1, 2, 2), "blocks": (1, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"24 x 40, and this network divides both sides by 16: .*bucket_step=16"):
        check_sizes(TRAIN.model_copy(update={"unet": deep}), dataset)
    with pytest.raises(ValueError, match="made for squares"):
        check_sizes(TRAIN.model_copy(update={"degradations": ("inpainting",)}), dataset)
    with pytest.raises(ValueError, match=r"latents .* are made of squares"):
        check_sizes(TRAIN.model_copy(update={"codec": "autoencoder-kl"}), dataset)


def test_attention_is_a_level_s_whatever_the_shape():
    facts = {"classes": 1, "channels": 32, "multipliers": (1, 2), "blocks": (1, 1), "stem": 2}
    net = UNet(resolution=32, attention=(8,), **facts)
    plain = UNet(resolution=32, attention=(), **facts)
    for level in (*net.down, *net.up):  # so that what a level adds shows
        for attention in level.attentions:
            if not isinstance(attention, torch.nn.Identity):
                torch.nn.init.normal_(attention.out.weight, std=0.2)
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    for model in (net, plain):
        torch.manual_seed(0)
        torch.nn.init.normal_(model.head.weight, std=0.1)
    for height, width in SIZES:
        x, level, label = torch.randn(2, 3, height, width), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
        assert net(x, level, label).shape == x.shape
        assert not torch.allclose(net(x, level, label), plain(x, level, label), atol=1e-4)


# drawing


def test_pictures_of_every_size_are_the_same_alone_and_among_others():
    requests = [
        GenerateRequest(label="cat", seed=1, n=3, size="24x8"),
        GenerateRequest(label="cat", seed=1, n=2),
        GenerateRequest(label="dog", seed=2, n=2, size="8x24", sampler="ddim", steps=7),
        GenerateRequest(seed=3, n=1, size="24x8", steps=3),
        GenerateRequest(label="dog", seed=2, n=2, size="16x16"),
    ]
    engine = Engine(shaped_bundle(), slots=5)
    together = engine.generate(requests)
    assert [row[0].shape for row in together] == [(8, 24, 3), (16, 16, 3), (24, 8, 3), (8, 24, 3), (16, 16, 3)]
    for request, drawn in zip(requests, together, strict=True):
        (alone,) = Engine(shaped_bundle(), slots=2).generate([request])
        assert all(np.array_equal(a, b) for a, b in zip(alone, drawn, strict=True))
    (square,) = Engine(random_bundle(), slots=5).generate([GenerateRequest(label="cat", seed=1, n=2)])
    assert np.array_equal(square, together[1])  # as of a model that knows no other size


def test_batch_sizes_are_proven_for_each_size_of_pictures():
    """A network whose answers depend on the number of rows where pictures are wide, unless there are 8."""
    bundle = shaped_bundle()

    class Fickle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bundle.denoiser

        def forward(self, x, sigma, label):
            other = x.shape[3] == 24 and len(x) != 8
            return self.inner(x, sigma, label) + (1e-2 * len(x) if other else 0)

    engine = Engine(replace(bundle, denoiser=Fickle()), slots=5)
    wide = GenerateRequest(label="cat", seed=1, size="24x8")
    (alone,), (among, *_) = engine.generate([wide]), engine.generate([wide, wide.model_copy(update={"n": 4})])
    assert np.array_equal(alone[0], among[0])
    assert len(engine.ladder.sizes) > 1


def test_a_failure_of_one_size_is_not_the_others():
    bundle = shaped_bundle()

    class Picky(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bundle.denoiser

        def forward(self, x, sigma, label):
            if x.shape[3] == 24:
                raise RuntimeError("too wide")
            return self.inner(x, sigma, label)

    engine = Engine(replace(bundle, denoiser=Picky()), slots=5)
    with running(engine):
        asked = [GenerateRequest(label="cat", seed=1, size=size) for size in ("24x8", "16x16")]
        tickets = [engine.submit(engine.job(resolve(request, bundle.spec))) for request in asked]
        with pytest.raises(DrawingFailed, match="too wide"):
            tickets[0].future.result(30)
        assert tickets[1].future.result(30)[0].shape == (16, 16, 3)


def test_a_size_is_one_of_the_model_s_and_stands_in_the_receipt():
    spec = shaped_bundle().spec
    assert (
        resolve(GenerateRequest(size="24x8"), spec).size == resolve(GenerateRequest(size="24X8"), spec).size == (8, 24)
    )
    assert resolve(GenerateRequest(), spec).size == spec.size == (16, 16)
    assert spec.model_copy(update={"sizes": ((24, 8), (8, 24), (8, 32))}).size == (8, 24)  # no square: the squarest
    for size in ("8x16", "024x8", "24 x 8", "square"):
        with pytest.raises(RequestError, match="width x height, are 8x24, 16x16, 24x8") as error:
            resolve(GenerateRequest(size=size), spec)
        assert (error.value.param, error.value.allowed) == ("size", ["8x24", "16x16", "24x8"])
    plain = random_spec("bf16", "4" * 64, 1)
    assert resolve(GenerateRequest(size="16x16"), plain).size is None
    assert "sizes" not in plain.model_dump_json()
    picture = np.zeros((8, 24, 3), np.uint8)
    facts = {"bundle_digest": "5" * 64, "model": "m", "version": "1"}
    for asked, of, said in (("24x8", spec, "24x8"), (None, plain, None)):
        receipt = receipt_of(picture, 0, resolve(GenerateRequest(seed=1, size=asked), of), of, **facts)
        assert read_receipt(stamp(picture, receipt)).size == said


def test_a_grid_has_pictures_in_the_middle_of_white_cells():
    pictures = [np.full((*size, 3), 9, np.uint8) for size in ((4, 2), (2, 6))]
    page = grid(pictures, 2, gap=1)
    assert page.shape == (6, 15, 3)
    assert (page[1:5, 3:5] == 9).all()
    assert (page[2:4, 8:14] == 9).all()
    assert (page == 9).sum() == 3 * (8 + 12)


# evaluation


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    """A run of the preset `smoke` in buckets, and its evaluation."""
    smoke, root = PRESETS["smoke"](), tmp_path_factory.mktemp("store")
    recipe = Recipe(**dict(smoke) | {"shard": RECIPE})
    run = make_run(write(tmp_path_factory.mktemp("source")), recipe, root)
    return run, recipe, root, evaluate(run, recipe.evaluate, root)


def test_an_evaluation_draws_the_sizes_of_the_data_and_measures_each_picture(bucketed):
    run, recipe, _, ref = bucketed
    report, bundle = load_report(ref.uri, ref.digest), load_bundle(ref.bundle_uri, digest=ref.bundle_digest)
    assert bundle.spec.sizes == SIZES == run.dataset.sizes
    reader = ShardReader(run.dataset.uri)
    plan = [draw for draw in draws(reader.manifest.train_counts, recipe.evaluate, reader.labels) if draw.shown]
    requests = []
    for draw in plan:
        height, width = reader.read(draw.like).image.shape[:2]
        requests.append(
            GenerateRequest(label=bundle.spec.classes[draw.label], seed=draw.seed, size=f"{width}x{height}")
        )
    columns, cell, gap = recipe.evaluate.grid_columns, 40, 2
    page = np.array(Image.open(Path(ref.uri, "grid.png")).convert("RGB"))
    served = Engine(bundle, slots=3).generate(requests[::-1])[::-1]
    assert {picture.shape[:2] for (picture,) in served} == set(SIZES)
    for draw, (picture,) in zip(plan, served, strict=True):
        height, width = picture.shape[:2]
        top = gap + draw.label * (cell + gap) + (cell - height) // 2
        left = page.shape[1] - (columns - draw.ordinal) * (cell + gap) + (cell - width) // 2
        assert np.array_equal(page[top : top + height, left : left + width], picture)
    held = ShardReader(run.dataset.uri, "holdout")
    chosen = evenly(len(held), recipe.evaluate.loss_pictures)
    for level, found in enumerate(report.held_out):  # one picture at a time
        losses = []
        for number, i in enumerate(chosen):
            sample = held.read(i)
            x0, cond = to_model(torch.from_numpy(sample.image)[None]), {"label": torch.tensor([sample.label])}
            losses.append(
                held_out_loss(bundle.denoiser, x0, cond, torch.tensor([number]), level=level, recipe=recipe.evaluate)[
                    "loss"
                ]
            )
        assert found.pictures == len(chosen)
        assert found.loss == pytest.approx(float(np.concatenate(losses).mean()), rel=5e-3)  # bf16, another batch
    assert report.bound.identity.pictures == len(chosen)
    assert not report.problems


def test_the_results_of_groups_are_in_the_order_of_the_pictures(bucketed):
    run, recipe, root, _ = bucketed
    reader = ShardReader(run.dataset.uri)
    seen: list[int] = []

    def each(setup, tasks):
        for task, result in zip(tasks, in_process(setup, tasks), strict=True):
            if task.kind == "real":
                if task.split == "train":
                    seen.append(len(result.arrays["features"]))
                one = worker.Worker(setup)
                for place in (0, len(task.indices) // 2, len(task.indices) - 1):
                    alone = one(task.model_copy(update={"indices": (task.indices[place],)}))
                    assert np.array_equal(alone.arrays["features"][0], result.arrays["features"][place])
            yield result

    for kept in (root / "features").iterdir():
        kept.unlink()
    evaluate(run, recipe.evaluate, root, each=each)
    assert sum(seen) == len(reader)
