"""Checkpoints: immutable folders named after the clock, verified before use.

`<images_seen>/`: `weights.safetensors` (raw), `ema-<width>.safetensors` (one per width), `uncertainty.safetensors` (of a
loss that learns one), `optimizer.safetensors` (`<parameter>.exp_avg`, ...), `state.json` (`Facts`) and, written last,
`manifest.json` (`Manifest`), whose sha256 is the checkpoint's digest.  Nothing is pickled.
"""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffusion.codec import CodecIdentity
from diffusion.recipe import Frozen, TrainRecipe, canonical_json, digest_of, unset, usual
from diffusion.store.averages import MANIFEST_NAME, STATE_NAME, File, Manifest
from diffusion.store.publish import publishing, room_in, sha256_file
from diffusion.store.refs import DatasetRef
from diffusion.text import TextIdentity
from diffusion.training.loop import Gather
from diffusion.training.row_files import allocate, write_rows
from diffusion.training.snapshot import WEIGHTS_NAME, Snapshot, restore, snapshot_of
from diffusion.training.step import TrainState

T = TypeVar("T")

_NAME_DIGITS = 12  # of images_seen in a folder's name: names sort as numbers


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those its manifest lists."""


class Facts(Frozen):
    """state.json: what the run is, and under what its bits were made."""

    recipe: TrainRecipe
    dataset_digest: str  # and not where it lies: the same run in another place has the same digests
    text: TextIdentity | None = Field(None, exclude_if=unset, description="What reads the captions, if anything does")
    codec: CodecIdentity | None = Field(None, exclude_if=unset, description="What made its latents, if it learns any")
    images_seen: int = Field(ge=0)
    world: int | None = Field(
        None,
        ge=1,
        exclude_if=unset,
        description="Worker processes the batch was divided over; in the exact mode no matter",
    )
    threads: int = Field(ge=1, description="Torch threads of each")
    device: str
    torch: str
    sharded: bool = Field(False, exclude_if=usual(False), description="Weights are divided over the workers")

    def surroundings(self) -> dict[str, Any]:
        """What must be equal for a resumed run to have the same bits, not only the same numbers up to rounding."""
        return {name: getattr(self, name) for name in ("world", "threads", "device", "torch", "sharded")}


def facts_of(
    recipe: TrainRecipe,
    dataset: DatasetRef,
    *,
    world: int,
    device: torch.device,
    text: TextIdentity | None = None,
    codec: CodecIdentity | None = None,
    sharded: bool = False,
) -> Facts:
    """Facts of a run in this process, at images_seen = 0.  text, codec: of the state that is trained."""
    return Facts(
        recipe=recipe,
        dataset_digest=dataset.digest,
        text=text,
        codec=codec,
        images_seen=0,
        world=world if recipe.micro_batch is None else None,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        sharded=sharded,
    )


def name_of(images_seen: int) -> str:
    """Of the folder of the checkpoint of this moment, and of its copy."""
    return f"{images_seen:0{_NAME_DIGITS}d}"


def folder_of(checkpoints: Path, images_seen: int) -> Path:
    """Where the checkpoint of this moment lies below a run's `checkpoints` folder."""
    return Path(checkpoints) / name_of(images_seen)


def save(state: TrainState, folder: Path, facts: Facts) -> str:
    """Publish the state as `folder`.  Returns the checkpoint's digest.  Its training waits: `training.saving` does not."""
    return publish(snapshot_of(state), folder, facts)


def publish(snapshot: Snapshot, folder: Path, facts: Facts) -> str:
    """Publish what a checkpoint keeps as `folder`.  Returns the checkpoint's digest.

    Where a valid checkpoint of that name exists, its digest is returned: a replayed run makes the same one.  A damaged
    one is set aside as `<name>.damaged-<n>`.  Raises DiskFull.
    """
    folder = Path(folder)
    make_way(folder)
    facts = facts.model_copy(update={"images_seen": snapshot.images_seen})
    try:
        return _publish(snapshot, folder, facts)
    except FileExistsError:  # it was there, or a worker of a driver that was killed is still there and was faster
        return digest_of(verify(folder))


def make_way(folder: Path) -> None:
    """Set a damaged checkpoint aside, so that its name can be used for a good one."""
    if folder.exists():
        try:
            verify(folder)
        except DamagedCheckpoint:
            _set_aside(folder)


def publish_together(snapshot: Snapshot, folder: Path, facts: Facts, gather: Gather, *, first: bool) -> str:
    """`publish` of a snapshot of which each process has some rows: all call this, each writes its own into the files of all,
    and no tensor is gathered.  The folder is on storage that all share.  first: true of one, which makes and publishes it.

    What fails on any process is raised on all.
    """
    facts = facts.model_copy(update={"images_seen": snapshot.images_seen})

    def begun(stack: ExitStack) -> Path | None:
        make_way(folder)
        if folder.exists():  # a replayed run makes the same
            return None
        temporary = stack.enter_context(publishing(folder))
        for name, rows in snapshot.rows.items():
            allocate(temporary / name, {tensor: where.shape for tensor, where in rows.items()})
        return temporary

    def write(temporary: Path) -> None:
        for name, tensors in snapshot.files.items():
            write_rows(temporary / name, tensors, snapshot.rows[name])

    def finished(stack: ExitStack, temporary: Path | None) -> str:
        if temporary:
            manifest = _close(temporary, snapshot, facts)
            with suppress(FileExistsError):  # as in `publish`
                stack.close()
                return digest_of(manifest)
        return digest_of(verify(folder))

    with room_in(folder.parent, f"the checkpoint {folder.name}"), ExitStack() as stack:
        temporary, *_ = _all(gather, lambda: begun(stack) if first else None)
        if temporary:
            _all(gather, lambda: write(temporary))
        digest, *_ = _all(gather, lambda: finished(stack, temporary) if first else None)
    return digest


def _all(gather: Gather, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each process.  Raises, on all, what the first of those that failed did."""
    done, error = None, None
    try:
        done = work()
    except Exception as failure:
        error = failure
    results = gather((done, error))
    for _, failure in results:
        if failure is not None:
            raise failure
    return [done for done, _ in results]


def _publish(snapshot: Snapshot, folder: Path, facts: Facts) -> str:
    with room_in(folder.parent, f"the checkpoint {folder.name}"), publishing(folder) as temporary:
        for name, tensors in snapshot.files.items():
            _write(tensors, temporary / name)
        manifest = _close(temporary, snapshot, facts)
    return digest_of(manifest)


def _close(temporary: Path, snapshot: Snapshot, facts: Facts) -> Manifest:
    """Put what a checkpoint is beside its tensors, and the manifest last."""
    (temporary / STATE_NAME).write_bytes(canonical_json(facts))
    names = sorted(path.name for path in temporary.iterdir())
    manifest = Manifest(
        images_seen=snapshot.images_seen,
        recipe_digest=digest_of(facts.recipe),
        dataset_digest=facts.dataset_digest,
        weights=WEIGHTS_NAME,
        ema=snapshot.ema,
        files={
            name: File(bytes=(temporary / name).stat().st_size, sha256=sha256_file(temporary / name)) for name in names
        },
    )
    (temporary / MANIFEST_NAME).write_bytes(canonical_json(manifest))
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its manifest.  Raises DamagedCheckpoint naming the file."""
    manifest = read_manifest(folder)
    for name, file in manifest.files.items():
        part = Path(folder) / name
        actual = sha256_file(part) if part.is_file() else "nothing"
        if actual != file.sha256:
            raise DamagedCheckpoint(
                f"{part}: sha256 {actual[:12]}, the manifest says {file.sha256[:12]}. A published checkpoint never changes,"
                f" so this copy is damaged: delete its folder and train again, the run goes on from the one before it."
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; the files it lists are not read.  Raises DamagedCheckpoint."""
    path = Path(folder) / MANIFEST_NAME
    try:
        data = path.read_bytes()
        manifest = Manifest.model_validate_json(data)
    except (OSError, ValidationError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({type(error).__name__}): the checkpoint is damaged") from error
    if hashlib.sha256(data).hexdigest() != digest_of(manifest):
        raise DamagedCheckpoint(f"{path} is not in canonical form: it was edited after it was published")
    return manifest


def folders_in(checkpoints: Path) -> list[Path]:
    """Every checkpoint below `checkpoints`, valid or not, oldest first."""
    return sorted(Path(checkpoints).glob("[0-9]" * _NAME_DIGITS))


def latest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint below `checkpoints`, or None, and why each newer one cannot be used."""
    damaged = []
    for folder in reversed(folders_in(checkpoints)):
        try:
            verify(folder)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def read_facts(folder: Path) -> Facts:
    """state.json of a checkpoint, unverified."""
    return Facts.model_validate_json((Path(folder) / STATE_NAME).read_bytes())


def load(folder: Path, state: TrainState, facts: Facts) -> dict[str, tuple[Any, Any]]:
    """Verify a checkpoint and put it into `state`, whose tensors keep their device and memory format.

    facts: of the run that resumes.  Another recipe, dataset, text encoder or codec is refused by what differs; the state is
    then unchanged.  Returns the surroundings that changed, name -> (then, now): with none, the resumed run has
    the same bits as the uninterrupted one.
    """
    folder = Path(folder)
    verify(folder)
    saved = read_facts(folder)
    refuse_other_run(folder, saved, facts.recipe, facts.dataset_digest)
    if saved.text != facts.text:
        raise ValueError(
            f"{folder} was trained on the text encoder {saved.text}, and here is {facts.text}: the same captions would be"
            f" other numbers from here on. Put the encoder's files back as they were, or train into a new run folder."
        )
    if saved.codec != facts.codec:
        raise ValueError(
            f"{folder} was trained on latents of the codec {saved.codec}, and here is {facts.codec}: the same pictures would"
            f" be other numbers from here on. Put the codec's files back as they were, or train into a new run folder."
        )
    restore(state, folder)
    state.images_seen = saved.images_seen
    then, now = saved.surroundings(), facts.surroundings()
    return {name: (then[name], now[name]) for name in then if then[name] != now[name]}


def refuse_other_run(folder: Path, saved: Facts, recipe: TrainRecipe, dataset_digest: str) -> None:
    """Raise ValueError naming the first fields in which the checkpoint's recipe or dataset is not the one asked for."""
    differences = _differences("train", saved.recipe.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if saved.dataset_digest != dataset_digest:
        differences.append(f"dataset.digest is {saved.dataset_digest[:12]}, asked {dataset_digest[:12]}")
    if differences:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(differences[:5])}. Resuming would mix two experiments: train into"
            f" a new run folder, or ask for the recipe and data of this one."
        )


def _differences(name: str, saved: Any, asked: Any) -> list[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        keys = sorted(saved.keys() | asked.keys())
        return [d for key in keys for d in _differences(f"{name}.{key}", saved.get(key), asked.get(key))]
    return [] if saved == asked else [f"{name} is {saved!r}, asked {asked!r}"]


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    # contiguous: the file knows no memory formats, and equal weights are to give equal bytes
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(data, path)
    except SafetensorError as error:  # which has the system's number in its words alone
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def _set_aside(folder: Path) -> None:
    n = 1
    while (target := folder.with_name(f"{folder.name}.damaged-{n}")).exists():
        n += 1
    os.rename(folder, target)
