"""What a checkpoint keeps of a state: its tensors by file and name, as they live, copied, and put back."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.training.row_files import read_rows
from diffusion.training.shards import Rows
from diffusion.training.step import TrainState

WEIGHTS_NAME = "weights.safetensors"
UNCERTAINTY_NAME = "uncertainty.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"  # `<parameter>.exp_avg`, ...
_UNCERTAINTY = "uncertainty."  # what its parameters' names begin with in a state


def ema_name(sigma_rel: float) -> str:
    """File name of the average of one relative width."""
    return f"ema-{sigma_rel!r}.safetensors"


class Snapshot(NamedTuple):
    """What a checkpoint keeps of a state at one moment."""

    images_seen: int
    files: dict[str, dict[str, Tensor]]  # file name -> name -> tensor
    ema: dict[str, str]  # relative width as Python writes it -> file name
    # where this process has some rows of each tensor: file name -> name -> which
    rows: dict[str, dict[str, Rows]] | None = None


def snapshot_of(state: TrainState) -> Snapshot:
    """The live tensors of a state: the next step changes them."""
    ema = {sigma_rel: ema_name(sigma_rel) for sigma_rel in state.ema.averages}
    files = _learned(state) | {name: state.ema.state_dict(sigma_rel) for sigma_rel, name in ema.items()}
    files[OPTIMIZER_NAME] = optimizer_tensors(state)
    rows = state.shards and {
        file: {name: _rows(state, file, name, tensor.shape) for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }
    return Snapshot(state.images_seen, files, {repr(sigma_rel): name for sigma_rel, name in ema.items()}, rows)


@torch.no_grad()
def copied(live: Snapshot, room: Snapshot | None = None) -> Snapshot:
    """The same in the host's memory, where no step changes it.  room: an earlier copy, whose memory is used again.

    From a GPU the bytes come to pinned memory in the order of its current stream, and this does not wait for them: they
    are there when an event recorded after it is, and the steps that follow do not disturb them (untested on a GPU).
    """
    files = {}
    for file, tensors in live.files.items():
        old = room.files.get(file, {}) if room else {}
        files[file] = {name: _room_for(tensor, old.get(name)) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            files[file][name].copy_(tensor, non_blocking=True)
    return live._replace(files=files)


def _room_for(tensor: Tensor, old: Tensor | None) -> Tensor:
    # laid out as the original, so that it is copied as it lies
    if old is not None and (old.shape, old.stride(), old.dtype) == (tensor.shape, tensor.stride(), tensor.dtype):
        return old
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


@torch.no_grad()
def restore(state: TrainState, folder: Path) -> None:
    """Put back what `snapshot_of` gave and a checkpoint's files hold; of a divided state each process reads its own rows.
    Tensors keep their device and memory format."""

    def read(file: str) -> dict[str, Tensor]:
        return read_rows(folder / file, partial(_rows, state, file)) if state.shards else load_file(folder / file)

    for file, own in _learned(state).items():
        for name, saved in read(file).items():
            own[name].copy_(saved)
    for sigma_rel in state.ema.averages:
        state.ema.load_state_dict(sigma_rel, read(ema_name(sigma_rel)))
    load_optimizer_tensors(state, read(OPTIMIZER_NAME))


def optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, `<parameter>.<quantity>`.  Learning rate and decay are the recipe's."""
    return {
        f"{name}.{quantity}": value
        for name, parameter in state.parameters().items()
        for quantity, value in state.optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def load_optimizer_tensors(state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    parameters = state.parameters()
    state.optimizer.state.clear()
    for key, value in tensors.items():
        name, quantity = key.rsplit(".", 1)
        parameter = parameters[name]
        # the fused kernel wants moments laid out in memory as their parameter is
        like = torch.empty_like(parameter) if value.shape == parameter.shape else value.to(parameter.device)
        state.optimizer.state[parameter][quantity] = like.copy_(value)


def _learned(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """The parameters, by file and by their names in it."""
    net = {name: own for name, own in state.parameters().items() if not name.startswith(_UNCERTAINTY)}
    rest = {name.removeprefix(_UNCERTAINTY): own for name, own in state.parameters().items() if name not in net}
    files = {WEIGHTS_NAME: net} | ({UNCERTAINTY_NAME: rest} if rest else {})
    return {file: {name: own.detach() for name, own in named.items()} for file, named in files.items()}


def _rows(state: TrainState, file: str, name: str, shape: Sequence[int]) -> Rows:
    """Which rows of a tensor of a file this process has of a divided state.  shape: of it or of its rows.  What all have, as
    the number of an optimizer's steps, counts as the first one's."""
    if not shape:
        return Rows((), 0, int(state.shards.rank == 0))
    owner = {OPTIMIZER_NAME: name.rpartition(".")[0], UNCERTAINTY_NAME: _UNCERTAINTY + name}.get(file, name)
    return state.shards.rows(owner)
