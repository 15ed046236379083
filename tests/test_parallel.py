"""Processes joined by torch.distributed over gloo, without Ray."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.training.parallel import data_parallel
from diffusion.training.step import TrainState, build_state

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = TrainRecipe(unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()), lr=0.01)


def take_steps(state: TrainState, *, skip_second: bool) -> None:
    """Three steps of the optimizer on gradients that are the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for p in state.net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        skip = torch.tensor(step == 1) if skip_second else None
        state.optimizer.step(skip=skip)


def state_of_run() -> TrainState:
    return build_state(RECIPE, resolution=16, classes=3, device="cpu")


def work(rank: int, world: int, folder: Path, skip_second: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    state = state_of_run()
    data_parallel(state, 16)
    take_steps(state, skip_second=skip_second)
    torch.save(tensors_of(state), folder / f"{rank}.pt")
    dist.destroy_process_group()


def tensors_of(state: TrainState) -> list[torch.Tensor]:
    """Weights and what the optimizer remembers of each."""
    kept = []
    for p in state.net.parameters():
        kept += [p.detach(), *(value for _, value in sorted(state.optimizer.state[p].items()))]
    return kept


@pytest.mark.parametrize(("world", "skip_second"), [(2, False), (3, True)])
def test_the_divided_step_is_the_step_of_one_process_bit_for_bit(world, skip_second, tmp_path):
    torch.multiprocessing.spawn(work, (world, tmp_path, skip_second), nprocs=world)
    alone = state_of_run()
    take_steps(alone, skip_second=skip_second)
    expected = tensors_of(alone)
    for rank in range(world):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
