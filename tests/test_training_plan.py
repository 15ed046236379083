"""What is foretold of a run is what the run then has: numbers of the real state, step, checkpoint and reader."""

from pathlib import Path

import pytest

from diffusion.data import manifest
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe, TrainRecipe, UNetRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from diffusion.training.plan import Plan, activation_bytes, inputs, plan_of, ranks_of
from diffusion.training.step import build_state, end_of, net_of
from flows.dry_run import plan_told
from tests.dataset_of import publish, sample
from tests.made_run import CLASSES, make_run

SIDE = 32


def plan(recipe: TrainRecipe, world: int = 1, **options: bool) -> Plan:
    return plan_of(recipe, side=SIDE, classes=len(CLASSES), world=world, **options)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_memory_is_that_of_the_state_after_a_step(tiny_recipe: Recipe, tmp_path: Path, optimizer: str):
    recipe = tiny_recipe.train.model_copy(update={"optimizer": optimizer, "images": 16})
    run = make_run(tmp_path, recipe)
    foretold, state = plan(recipe), build_state(recipe, resolution=SIDE, classes=len(CLASSES), device="cpu")
    weights = sum(parameter.nbytes for parameter in state.net.parameters())
    assert foretold.parameters * 4 == foretold.memory.weights == foretold.memory.gradients == weights
    assert foretold.memory.averages == sum(a.nbytes for average in state.ema.averages.values() for a in average)
    size = {path.name: path.stat().st_size for path in Path(run.uri).glob("*.safetensors")}
    assert foretold.memory.optimizer == pytest.approx(size["optimizer.safetensors"], rel=0.1)  # and names and steps
    assert foretold.checkpoint_bytes == pytest.approx(sum(size.values()), rel=0.1)
    assert foretold.steps == end_of(recipe) // recipe.batch_size


def test_divided_weights_are_a_share_on_each_worker_and_what_is_gathered_to_compute(tiny_recipe: Recipe):
    """The gathered: all that is in no block, and the two largest; a block comes twice a step, the rest once."""
    recipe = tiny_recipe.train.model_copy(update={"optimizer": "adamw", "batch_size": 32})
    whole, divided = plan(recipe, world=8), plan(recipe, world=8, sharded=True)
    net = net_of(recipe, side=SIDE, classes=len(CLASSES)).net
    modules = [m for level in (*net.down, *net.up) for m in (*level.blocks, *level.attentions, *level.text_attentions)]
    blocks = [sum(p.nbytes for p in module.parameters()) for module in modules]
    rest = whole.memory.weights - sum(blocks)
    gathered = rest + sum(sorted(blocks)[-2:])
    assert divided.memory == (
        whole.memory.weights // 8 + gathered,
        *(size // 8 for size in (whole.memory.gradients, whole.memory.optimizer, whole.memory.averages)),
        whole.memory.activations,
    )
    assert divided.update_bytes == rest + 2 * sum(blocks)
    assert plan(recipe, sharded=True) == plan(recipe)
    changed = ("memory", "update_bytes")
    assert [(n, v) for n, v in divided._asdict().items() if n not in changed] == [
        (n, v) for n, v in whole._asdict().items() if n not in changed
    ]


@pytest.mark.parametrize(
    ("precision", "conditions"), [("fp32", {}), ("bf16", {}), ("fp32", {"text_width": 24, "attention": (16,)})]
)
def test_the_activations_are_those_of_a_real_forward_pass(tiny_recipe: Recipe, precision: str, conditions: dict):
    unet = UNetRecipe(**tiny_recipe.train.unet.model_dump() | conditions)
    encoder = {"text_encoder": "minilm", "text_tokens": 5} if conditions else {}
    recipe = tiny_recipe.train.model_copy(update={"unet": unet, "precision": precision} | encoder)
    net = net_of(recipe, side=SIDE, classes=len(CLASSES))
    real = activation_bytes(net, inputs(net, (recipe.batch_size, 3, SIDE, SIDE), 5))
    foretold = plan(recipe).memory.activations
    assert foretold == pytest.approx(real, rel=0 if precision == "fp32" else 1e-3)  # bf16: of norms' sums
    kept_less = plan(recipe, recompute=True).memory.activations
    assert kept_less < 0.5 * foretold
    assert plan(recipe, world=2).memory.activations == pytest.approx(foretold / 2, rel=0.1)


def test_the_shards_of_a_rank_are_those_it_reads(tiny_recipe: Recipe, tmp_path: Path):
    recipe = tiny_recipe.train.model_copy(update={"batch_size": 4, "window": 6, "streams": 2})
    shards = [[sample(7 * number + i, 8) for i in range(count)] for number, count in enumerate((7, 7, 4, 7, 3))]
    dataset = publish(LocalFolder(tmp_path / "root"), tmp_path, shards, 8)
    made = manifest.load(dataset.uri)
    for world in (1, 2, 4):
        found, reader = ranks_of(made, recipe, world), ShardReader(dataset.uri)
        assert found.pictures == 28 == len(reader)
        assert found.all == 5
        at_once = []
        for rank in range(world):
            opened = set()
            share = batches(reader, order_of(made, "train", recipe), 4, stop=28, rank=rank, world=world)
            for batch in share:
                here = {n for n, rows in enumerate(shards) for row in rows if row.key in batch.keys}
                at_once.append(len(here))
                opened |= here
            assert found.shards[rank] == len(opened)
            assert found.bytes[rank] == sum(made.shards[number].bytes for number in opened)
        assert found.at_once == max(at_once)


def test_a_batch_that_cannot_be_divided_is_refused(tiny_recipe: Recipe):
    with pytest.raises(ValueError, match="batch_size=8 cannot be divided over 3 workers"):
        plan(tiny_recipe.train, world=3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_on_as_many_workers_as_it_names(name: str):
    recipe = PRESETS[name]()
    side = recipe.shard.resolution // recipe.train.codec_factor
    found = plan_of(recipe.train, side=side, classes=10, world=8)
    assert found.gradient_bytes == 4 * found.parameters
    said = plan_told(found, None, None)
    assert f"{found.share} x {recipe.train.codec_channels} x {side} x {side} on each of 8 workers" in said["batch"]
    assert "diffusion shard" in said["shards"]


def test_in_words(tiny_recipe: Recipe, tmp_path: Path):
    dataset: DatasetRef = publish(LocalFolder(tmp_path / "root"), tmp_path, [[sample(i, 32) for i in range(64)]], 32)
    recipe = tiny_recipe.train
    ranks = ranks_of(manifest.load(dataset.uri), recipe, 2)
    said = plan_told(plan(recipe, world=2), ranks, dataset)
    assert said["data"] == "64 pictures, each seen 2 times"
    assert said["shards"].startswith("a worker reads 1 of 1 in the first epoch")
    assert "of gradients in each step, and" in said["exchanged"]
    assert "exchanged" not in plan_told(plan(recipe), ranks, dataset)
