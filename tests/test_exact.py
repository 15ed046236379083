"""training/exact.py: the exact mode has the same bits on any number of processes, and is the same optimization."""

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusion.presets import PRESETS
from diffusion.recipe import TrainRecipe, UNetRecipe, digest_of
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.corrupt import corrupt
from diffusion.training.exact import check_workers, tree_sum, workers_of
from diffusion.training.loop import train
from diffusion.training.parallel import data_parallel, exact_parallel, world_gather
from diffusion.training.step import Part, TrainState, build_state, parts_of, train_step
from tests.joined import in_processes
from tests.random_batch import random_batch

# eight processes meet often: on a machine with much else to do each meeting takes a while
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]

STEPS = 4
EXACT = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=(8,), dropout=0.2),
    images=16 * STEPS,
    batch_size=16,
    micro_batch=2,
    warmup_images=0,
    weight="uncertainty",
    noise_stratified=True,
    hflip=True,
    clip_norm=0.1,
    checkpoint_images=16,
)
# float32 and AdamW, so that the order of sums is all that differs
PLAIN = EXACT.model_copy(
    update={
        "micro_batch": None,
        "precision": "fp32",
        "optimizer": "adamw",
        "unet": UNetRecipe(**EXACT.unet.model_dump() | {"dropout": 0.0}),
    }
)
WORLDS = {"1": [1], "8": [8], "1, 2, 4, 1": [1, 2, 4, 1]}  # name of a run -> its worlds, in turns
DATASET = DatasetRef(
    uri="/nowhere", digest="d" * 64, resolution=16, classes=("a", "b", "c"), images=9, holdout=0, rejected=0
)


def batch_at(start: int, size: int = EXACT.batch_size) -> Part:
    return random_batch(start, size, side=16, classes=3)


def state_of(recipe: TrainRecipe) -> TrainState:
    return build_state(recipe, resolution=16, classes=3, device="cpu")


def gradients_of(state: TrainState) -> list[torch.Tensor]:
    return [p.grad.clone() for p in state.parameters().values()]


def slow_sum(terms: list[torch.Tensor]) -> torch.Tensor:
    """The definition, by recursion."""
    if len(terms) == 1:
        return terms[0]
    half = 1
    while 2 * half < len(terms):
        half *= 2
    return slow_sum(terms[:half]) + slow_sum(terms[half:])


def random_terms(n: int, seed: int = 0) -> list[torch.Tensor]:
    """Numbers of magnitudes so different that the order of their sum shows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(33, generator=generator) * 10 ** torch.rand(33, generator=generator).mul(6) for _ in range(n)]


def summed(terms: list[torch.Tensor]) -> torch.Tensor:
    (total,) = tree_sum([term.clone()] for term in terms)
    return total


@given(st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_sum_is_the_tree_of_its_definition(n: int, seed: int):
    terms = random_terms(n, seed)
    assert torch.equal(summed(terms), slow_sum(terms))


@given(st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_sums_of_equal_branches_sum_to_the_sum_of_all(workers: int, height: int):
    size = 2**height
    terms = random_terms(workers * size)
    branches = [summed(terms[i : i + size]) for i in range(0, len(terms), size)]
    assert torch.equal(summed(branches), summed(terms))


def test_the_order_of_such_a_sum_shows_at_all():
    terms = random_terms(8)
    assert not torch.equal(summed(terms), sum(terms[1:], terms[0]))
    assert not torch.equal(summed(terms), summed(terms[1:] + terms[:1]))


def test_a_sum_holds_few_of_its_terms_at_a_time():
    most, alive = 0, weakref.WeakSet()

    def terms() -> Iterator[list[torch.Tensor]]:
        nonlocal most
        for _ in range(64):
            term = torch.ones(3)
            alive.add(term)
            most = max(most, len(alive))
            yield [term]
            del term

    (total,) = tree_sum(terms())
    assert torch.equal(total, torch.full((3,), 64.0))
    assert most <= 7 + 1  # log2(64) + 1, and the one that is being made


def test_the_gradient_is_the_mean_of_those_of_the_micro_batches_alone():
    """Bit for bit along the tree, and that of the whole batch but for rounding."""
    recipe = PLAIN.model_copy(update={"clip_norm": 1e9})
    exact, batch = recipe.model_copy(update={"micro_batch": 2}), batch_at(0)

    def gradients(recipe: TrainRecipe, batch: Part) -> list[torch.Tensor]:
        state = state_of(recipe)
        torch.nn.init.normal_(state.net.net.head.weight, generator=torch.Generator().manual_seed(1))
        train_step(state, batch, recipe)
        return gradients_of(state)

    alone = [gradients(recipe, part) for part in parts_of(batch, 2)]
    for whole, got, *terms in zip(gradients(recipe, batch), gradients(exact, batch), *alone, strict=True):
        assert torch.equal(got, slow_sum(terms) / 8)
        torch.testing.assert_close(got, whole, rtol=1e-3, atol=1e-5)


def test_a_step_reports_every_picture_of_the_batch_in_order():
    result, expected = (
        train_step(state_of(EXACT), batch_at(0), EXACT),
        corrupt(batch_at(0), EXACT, 3, torch.device("cpu")),
    )
    assert torch.equal(result.sigma, expected.sigma)
    assert torch.equal(result.level, expected.level)
    assert result.losses.shape == (16,)
    assert result.grad_norm > EXACT.clip_norm  # what the tests below compare is clipped


def test_the_workers_that_hold_whole_branches_are_allowed():
    assert workers_of(EXACT) == (1, 2, 4, 8)
    assert workers_of(EXACT.model_copy(update={"batch_size": 24})) == (1, 3, 6, 12)
    assert workers_of(EXACT.model_copy(update={"micro_batch": 16})) == (1,)
    assert workers_of(EXACT.model_copy(update={"micro_batch": None})) == (1, 2, 4, 8, 16)
    for workers in (1, 2, 4, 8):
        check_workers(EXACT, workers)
    with pytest.raises(
        ValueError, match=r"8 micro-batches, which 16 workers cannot .* choose 1 or 2 or 4 or 8 workers"
    ):
        check_workers(EXACT, 16)
    with pytest.raises(ValueError, match="micro_batch=5 does not divide batch_size=16: choose a divisor"):
        TrainRecipe(batch_size=16, micro_batch=5)


def test_a_recipe_without_micro_batches_is_written_as_before():
    assert "micro_batch" not in PRESETS["demo"]().train.model_dump()
    assert digest_of(EXACT) != digest_of(EXACT.model_copy(update={"micro_batch": 4}))


class Stop(Exception):
    pass


def process(rank: int, folder: Path) -> None:
    """Takes part in every run whose world is larger than its rank."""
    torch.set_num_threads(1)
    for name, recipe in (("exact", EXACT), ("plain", PLAIN)):
        for run, worlds in WORLDS.items():
            for turn, world in enumerate(worlds):
                if rank < world and (name == "exact" or len(worlds) > 1 or world == 1):
                    stop = 16 * STEPS * (turn + 1) // len(worlds)
                    one_turn(folder / name / run, f"{folder}/{name} {run} {turn}", recipe, rank, world, stop)


def one_turn(folder: Path, rendezvous: str, recipe: TrainRecipe, rank: int, world: int, stop: int) -> None:
    """Resume or start, and train up to `stop`, as one of `world` processes."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    state, records = state_of(recipe), []
    facts = checkpoint.facts_of(recipe, DATASET, world=world, device=torch.device("cpu"))
    newest, _ = checkpoint.latest(folder)
    if newest:
        changed = checkpoint.load(newest, state, facts)
        assert ("world" in changed) == (recipe.micro_batch is None)

    def save(state: TrainState) -> None:
        if rank == 0:
            checkpoint.save(state, checkpoint.folder_of(folder, state.images_seen), facts)
        if state.images_seen == stop:
            raise Stop

    exact = recipe.micro_batch is not None
    size = recipe.batch_size
    shares = (list(parts_of(batch_at(start), size // world))[rank] for start in range(state.images_seen, stop, size))
    with pytest.raises(Stop):
        train(
            state,
            shares,
            recipe,
            model=None if exact else data_parallel(state, 16),
            add_up=exact_parallel(state, recipe) if exact else None,
            on_metrics=records.append,
            on_checkpoint=save,
            gather=world_gather(),
        )
    with open(folder / "records.jsonl" if rank == 0 else folder / f"records-{rank}.jsonl", "a") as file:
        file.writelines(
            json.dumps({name: record[name] for name in ("loss", "grad_norm", "lr")}) + "\n" for record in records
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and metrics of each of WORLDS in the exact mode, and of some without it."""
    folder = tmp_path_factory.mktemp("runs")
    in_processes(8, process, folder)
    return folder


def digest_at_the_end(folder: Path) -> str:
    return digest_of(checkpoint.verify(checkpoint.folder_of(folder, 16 * STEPS)))


@pytest.mark.parametrize("run", list(WORLDS)[1:])
def test_any_number_of_processes_publishes_the_same_checkpoint(run: str, runs: Path):
    """Weights, averages, optimizer, learned uncertainty and facts: all files, so one digest; and the same metrics."""
    assert digest_at_the_end(runs / "exact" / run) == digest_at_the_end(runs / "exact" / "1")
    expected = (runs / "exact" / "1" / "records.jsonl").read_text()
    assert len(expected.splitlines()) == STEPS
    assert (runs / "exact" / run / "records.jsonl").read_text() == expected


def test_without_the_exact_mode_other_numbers_of_processes_agree_within_rounding(runs: Path):
    start = torch.cat([p.detach().flatten() for p in state_of(PLAIN).net.parameters()])
    name = checkpoint.WEIGHTS_NAME
    ends = [load_file(checkpoint.folder_of(runs / "plain" / run, 16 * STEPS) / name) for run in ("1", "1, 2, 4, 1")]
    names = [name for name, _ in state_of(PLAIN).net.named_parameters()]
    one, moved = (torch.cat([end[name].flatten() for name in names]) for end in ends)
    assert not torch.equal(one, moved)  # or the exact mode would be for nothing
    assert (one - moved).norm() < 1e-3 * (one - start).norm()
