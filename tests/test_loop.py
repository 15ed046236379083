"""training/loop.py, parallel.py, journal.py: interrupted, divided or replayed, a run is the same run."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from diffusion.data.ingest import shard_dataset
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import Batch, batches
from diffusion.recipe import ShardRecipe, TrainRecipe, UNetRecipe, checkpoints_of
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.journal import Journal
from diffusion.training.loop import metrics_images_of, train
from diffusion.training.parallel import data_parallel, world_gather
from diffusion.training.step import NonFiniteLoss, TrainState, build_state, end_of
from tests.joined import in_processes
from tests.random_bundle import TASKS
from tests.test_step import bits_of

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
    images=116,  # rounded up to 120
    batch_size=12,
    warmup_images=24,
    checkpoint_images=40,
    window=16,
    streams=2,
)
RESTORING = RECIPE.model_copy(update={"degradations": TASKS})
CLOCKS = ("images_per_s", "eta_s", "wait_share", "checkpoint_share")  # the metrics that are not functions of the recipe


@pytest.fixture(scope="module")
def dataset(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    """About fifty real pictures for training, at 16 x 16, in four shards."""
    recipe = ShardRecipe(resolution=16, shard_size=16, holdout=0.1)
    return shard_dataset(emoji_folder, recipe, tmp_path_factory.mktemp("store"))


def share(dataset: DatasetRef, recipe: TrainRecipe, start: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    reader = ShardReader(dataset.uri, "train")
    order = order_of(reader.manifest, "train", recipe)
    return batches(
        reader, order, recipe.batch_size, start=start, stop=end_of(recipe), rank=rank, world=world, threads=1
    )


def fresh(recipe: TrainRecipe = RECIPE) -> TrainState:
    return build_state(recipe, resolution=16, classes=3, device="cpu")


def run(
    dataset: DatasetRef, state: TrainState, recipe: TrainRecipe = RECIPE, on_checkpoint: Callable = lambda state: None
) -> list[dict]:
    records: list[dict] = []
    start = state.images_seen
    train(state, share(dataset, recipe, start), recipe, on_metrics=records.append, on_checkpoint=on_checkpoint)
    return records


def without_clocks(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in CLOCKS} for record in records]


@pytest.mark.parametrize("recipe", [RECIPE, RESTORING], ids=["draws", "restores"])
def test_resumed_is_uninterrupted_bit_for_bit(recipe: TrainRecipe, dataset: DatasetRef, tmp_path: Path):
    facts = checkpoint.facts_of(recipe, dataset, world=1, device=torch.device("cpu"))

    class Killed(Exception):
        pass

    def save_then_die(state: TrainState) -> None:
        checkpoint.save(state, checkpoint.folder_of(tmp_path, state.images_seen), facts)
        if state.images_seen == 84:
            raise Killed

    whole, dying, resumed = fresh(recipe), fresh(recipe), fresh(recipe)
    records = run(dataset, whole, recipe)
    with pytest.raises(Killed):
        run(dataset, dying, recipe, on_checkpoint=save_then_die)
    folder, _ = checkpoint.latest(tmp_path)
    assert folder is not None
    assert checkpoint.load(folder, resumed, facts) == {}
    assert resumed.images_seen == 84
    rest = run(dataset, resumed, recipe)
    assert bits_of(resumed) == bits_of(whole)
    assert without_clocks(rest) == without_clocks([r for r in records if r["images_seen"] > 84])


def test_hooks_come_at_multiples_and_at_the_end(dataset: DatasetRef):
    saved: list[int] = []
    records = run(dataset, state := fresh(), on_checkpoint=lambda state: saved.append(state.images_seen))
    assert saved == [48, 84, 120] == list(checkpoints_of(RECIPE))  # the first steps at or beyond 40, 80, 120
    assert state.images_seen == 120
    assert metrics_images_of(RECIPE) == 12
    assert [record["images_seen"] for record in records] == list(range(12, 121, 12))
    assert metrics_images_of(RECIPE.model_copy(update={"images": 64_000, "batch_size": 128})) == 256


def test_metrics_are_means_over_their_window(dataset: DatasetRef):
    each, whole = [], []
    for records, every in ((each, 12), (whole, 36)):
        state = fresh()
        train(state, share(dataset, RECIPE, 0), RECIPE, on_metrics=records.append, metrics_images=every)
    # records end at multiples of 36 and at checkpoints
    assert [record["images_seen"] for record in whole] == [36, 48, 72, 84, 108, 120]
    for name in ("loss", "grad_norm"):
        assert whole[0][name] == pytest.approx(sum(record[name] for record in each[:3]) / 3)
    assert set(whole[0]) == {
        "images_seen", "images", "loss", *(f"loss_level_{i}" for i in range(4)), "grad_norm", "lr", *CLOCKS
    }  # fmt: skip
    assert all(math.isfinite(value) for record in each + whole for value in record.values())
    assert 0 <= whole[0]["wait_share"] <= 1


def test_a_finished_run_does_nothing(dataset: DatasetRef):
    state = fresh()
    state.images_seen = 120
    before = bits_of(state)
    assert run(dataset, state) == []
    assert bits_of(state) == before


def test_a_non_finite_loss_names_the_pictures_of_all_processes(dataset: DatasetRef):
    state = fresh()
    torch.nn.init.constant_(state.net.net.head.bias, math.nan)
    with pytest.raises(NonFiniteLoss) as caught:
        train(
            state,
            share(dataset, RECIPE, 0),
            RECIPE,
            gather=lambda value: [value, (("from another process", 1.0, math.nan),)],
        )
    keys = [key for key, _, _ in caught.value.samples]
    assert len(keys) == 13
    assert keys[-1] == "from another process"


# so that the order of sums is all that differs; Muon orthogonalizes in bf16, where that order already shows
EXACT = RESTORING.model_copy(update={"precision": "fp32", "optimizer": "adamw"})
UNCERTAIN = EXACT.model_copy(update={"weight": "uncertainty", "noise_stratified": True})


def vector(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def learned(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in state.parameters().items()}


def _process(rank: int, world: int, rendezvous: str, dataset: DatasetRef, out: str, recipe: TrainRecipe) -> None:
    """One of `world` processes: a whole run, and one resumed from the whole run's first checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    facts = checkpoint.facts_of(recipe, dataset, world=world, device=torch.device("cpu"))
    folder = Path(out, f"rank-{rank}")

    def save_first(state: TrainState) -> None:
        if not folder.exists():
            checkpoint.save(state, folder, facts)

    whole, resumed = fresh(recipe), fresh(recipe)
    records: list[dict] = []
    for state in (whole, resumed):
        if state is resumed:
            checkpoint.load(folder, state, facts)
        train(
            state,
            share(dataset, recipe, state.images_seen, rank=rank, world=world),
            recipe,
            model=data_parallel(state, 16),
            on_metrics=records.append,
            on_checkpoint=save_first,
            gather=world_gather(),
        )
    assert bits_of(resumed) == bits_of(whole)
    save_file(learned(whole), Path(out, f"{rank}.safetensors"))
    Path(out, f"{rank}.json").write_text(json.dumps(without_clocks(records)))
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "recipe"), [(2, EXACT), (3, UNCERTAIN)], ids=["2", "3, learned uncertainty"])
def test_the_number_of_processes_changes_no_number(
    world: int, recipe: TrainRecipe, dataset: DatasetRef, tmp_path: Path
):
    in_processes(world, _process, world, str(tmp_path / "rendezvous"), dataset, str(tmp_path), recipe)
    before, alone = fresh(recipe), fresh(recipe)
    records = without_clocks(run(dataset, alone, recipe))
    before, after = learned(before), learned(alone)
    for rank in range(world):
        divided = load_file(tmp_path / f"{rank}.safetensors")
        assert (vector(divided) - vector(after)).norm() < 1e-3 * (vector(after) - vector(before)).norm()
        for name in divided.keys() - dict(alone.net.named_parameters()).keys():  # few among many: not lost in the norm
            torch.testing.assert_close(divided[name], after[name], rtol=1e-2, atol=1e-5)
            assert after[name].any()
        theirs = json.loads((tmp_path / f"{rank}.json").read_text())[: len(records)]
        for a, b in zip(records, theirs, strict=True):
            assert b == pytest.approx(a, rel=1e-3, abs=1e-6)


def test_the_journal_writes_each_moment_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.event({"event": "started", "images_seen": 0})
    assert journal.metrics({"images_seen": 8, "loss": 1.0})
    assert journal.metrics({"images_seen": 16, "loss": 0.9})
    with open(path, "a") as file:
        file.write('{"images_seen": 24, "lo')  # killed while writing
    journal = Journal(path)
    assert journal.images_seen == 16
    journal.event({"event": "resumed", "images_seen": 8})
    assert not journal.metrics({"images_seen": 16, "loss": 0.9})
    assert journal.metrics({"images_seen": 24, "loss": 0.8})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line.get("event"), line["images_seen"]) for line in lines] == [
        ("started", 0), (None, 8), (None, 16), ("resumed", 8), (None, 24)
    ]  # fmt: skip
