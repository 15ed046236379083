"""FSDP2 over gloo: weights that are divided over processes are the same weights, in training and in checkpoints."""

import errno
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffusion.recipe import TrainRecipe, UNetRecipe, digest_of
from diffusion.store.publish import DiskFull
from diffusion.training import checkpoint
from diffusion.training.loop import train
from diffusion.training.parallel import check_sharding, data_parallel, shard, world_gather
from diffusion.training.saving import Saving
from diffusion.training.shards import rows_of
from diffusion.training.snapshot import WEIGHTS_NAME, ema_name, snapshot_of
from diffusion.training.step import Part, TrainState, build_state, clip_gradients, parts_of
from tests.joined import in_processes
from tests.random_batch import random_batch
from tests.test_exact import DATASET

# three processes meet often: on a machine with much else to do each meeting takes a while
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]

STEPS = 4
# Muon and AdamW, clipping, an average, attention, a learned uncertainty of one row
RECIPE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=(8,)),
    images=12 * STEPS,
    batch_size=12,
    checkpoint_images=12,
    warmup_images=0,
    weight="uncertainty",
    precision="fp32",
    clip_norm=0.1,
)
FACTS = checkpoint.facts_of(RECIPE, DATASET, world=1, device=torch.device("cpu"))
PLAIN = RECIPE.model_copy(update={"optimizer": "adamw"})  # Muon's bf16 makes much of the last bit
WORLD = 3  # divides few of the shapes


def state_of(recipe: TrainRecipe) -> TrainState:
    return build_state(recipe, resolution=16, classes=3, device="cpu")


def share(start: int, stop: int, rank: int) -> Iterator[Part]:
    for position in range(start, stop, 12):
        yield list(parts_of(random_batch(position, 12, side=16, classes=3), 12 // WORLD))[rank]


class Stop(Exception):
    pass


def turn(folder: Path, recipe: TrainRecipe, *, sharded: bool, stop: int = 12 * STEPS, recompute: bool = False) -> None:
    """Start or go on, up to `stop`, as one of the processes that are joined, and save as each way does."""
    rank, gather, state = dist.get_rank(), world_gather(), state_of(recipe)
    state.net.net.recompute = recompute
    if sharded:
        shard(state, recipe)
        assert state.ema.averages[0.05][0].shape == next(iter(state.parameters().values())).shape
    facts = FACTS.model_copy(update={"recipe": recipe, "world": WORLD, "sharded": sharded})
    newest, _ = gather(checkpoint.latest(folder))[0]
    changed = checkpoint.load(newest, state, facts) if newest else {}
    assert set(changed) <= {"sharded"}
    publish = (
        partial(checkpoint.publish_together, gather=world_gather(beside=True), first=rank == 0) if sharded else None
    )
    with Saving(folder, facts, publish=publish) if sharded or rank == 0 else nullcontext() as saving:

        def save(state: TrainState) -> None:
            if saving:
                saving.begin(state)
            if state.images_seen == stop:
                raise Stop

        with pytest.raises(Stop):
            train(
                state,
                share(state.images_seen, stop, rank),
                recipe,
                model=None if sharded else data_parallel(state, 16),
                on_checkpoint=save,
                gather=gather,
            )
    gather(None)  # what one has published all see


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    turn(folder / "data parallel", PLAIN, sharded=False)
    turn(folder / "plain", PLAIN, sharded=True)
    turn(folder / "changed", PLAIN, sharded=False, stop=24)
    turn(folder / "changed", PLAIN, sharded=True)
    turn(folder / "sharded", RECIPE, sharded=True)
    turn(folder / "killed", RECIPE, sharded=True, stop=24)
    turn(folder / "killed", RECIPE, sharded=True, recompute=True)
    full_disk(folder, rank)
    same_gradients(folder, rank)
    dist.destroy_process_group()


def full_disk(folder: Path, rank: int) -> None:
    """On one process alone."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    state = state_of(RECIPE)
    shard(state, RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(checkpoint, "write_rows", full)
        with pytest.raises(DiskFull, match="no room for the checkpoint 7 in"):
            checkpoint.publish_together(
                snapshot_of(state), folder / "full" / "7", FACTS, world_gather(), first=rank == 0
            )


def same_gradients(folder: Path, rank: int) -> None:
    """Three steps of the optimizer, of which the second is skipped, on gradients that are given."""
    state = state_of(RECIPE)
    shard(state, RECIPE)
    norms = []
    for gradients in gradients_given():
        for name, own in state.parameters().items():
            own.grad = state.shards.rows(name).of(gradients[name]).clone()
        norms.append(step(state))
    kept = {name: own.detach() for name, own in state.parameters().items()}
    save_file(kept | {"norms": torch.stack(norms)}, folder / f"{rank}.safetensors")


def gradients_given() -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield {name: torch.randn(p.shape, generator=generator) for name, p in state_of(RECIPE).parameters().items()}


def step(state: TrainState) -> torch.Tensor:
    norm = clip_gradients(state, 0.1)
    skip = torch.tensor(len(state.optimizer.state) > 0 and state.images_seen == 12)
    state.optimizer.step(skip=skip)
    state.images_seen += 12
    return norm


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    in_processes(WORLD, process, folder)
    return folder


def end_of(run: Path) -> Path:
    return checkpoint.folder_of(run, 12 * STEPS)


@pytest.mark.parametrize("run", ["plain", "changed"])
@pytest.mark.parametrize("file", [WEIGHTS_NAME, ema_name(PLAIN.ema[0])])
def test_weights_and_averages_are_those_of_data_parallelism_but_for_the_order_of_sums(run: str, file: str, runs: Path):
    """From the start, and as a run goes on that has begun without."""
    start = state_of(PLAIN).net.state_dict()
    ends = [load_file(end_of(runs / name) / file) for name in ("data parallel", run)]
    whole, divided, before = (torch.cat([some[name].flatten() for name in start]) for some in (*ends, start))
    assert not torch.equal(whole, divided)
    assert (whole - divided).norm() < 1e-3 * (whole - before).norm()


def test_a_run_that_was_killed_comes_to_the_same_bits_also_where_blocks_are_computed_again(runs: Path):
    assert digest_of(checkpoint.verify(end_of(runs / "killed"))) == digest_of(
        checkpoint.verify(end_of(runs / "sharded"))
    )


def test_what_three_wrote_together_is_byte_for_byte_what_one_writes(runs: Path, tmp_path: Path):
    together = end_of(runs / "sharded")
    facts, state = checkpoint.read_facts(together), state_of(RECIPE)
    assert checkpoint.load(together, state, FACTS) == {"world": (3, 1), "sharded": (True, False)}
    assert checkpoint.save(state, tmp_path / "alone", facts) == digest_of(checkpoint.verify(together))


def test_a_step_of_the_rows_is_the_step_of_the_whole(runs: Path):
    """Muon and AdamW, clipped, skipped and not; no more than rounding is between them."""
    alone, norms = state_of(RECIPE), []
    for gradients in gradients_given():
        for name, parameter in alone.parameters().items():
            parameter.grad = gradients[name]
        norms.append(step(alone))
    parts = [load_file(runs / f"{rank}.safetensors") for rank in range(WORLD)]
    for part in parts:
        torch.testing.assert_close(part["norms"], torch.stack(norms))
    for name, parameter in alone.parameters().items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), parameter.detach())


def test_a_full_disk_of_one_is_told_on_all_and_nothing_appears(runs: Path):
    assert list((runs / "full").iterdir()) == []


def test_the_exact_mode_is_refused():
    check_sharding(RECIPE)
    with pytest.raises(ValueError, match=r"train\.micro_batch=4 asks for the same bits on any number of workers"):
        check_sharding(RECIPE.model_copy(update={"micro_batch": 4}))


@given(st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None)
def test_rows_are_dealt_out_as_torch_chunks(n: int, world: int):
    whole = torch.arange(n)
    chunks = [*whole.chunk(world), *[whole[:0]] * world][:world]
    assert [rows_of((n,), rank, world).of(whole).tolist() for rank in range(world)] == [c.tolist() for c in chunks]
