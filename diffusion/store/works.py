"""Doing work once: the reference that a piece of work gave, found again by what went into it."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from diffusion.recipe import Frozen, canonical_json, digest_of, first_mistake
from diffusion.store.publish import room_in, write_atomic
from diffusion.store.refs import DatasetRef, EvaluationRef, ModelRef, ReportRef, RunRef, SweepRef
from diffusion.store.storage import open_storage

# Raise a stage's number when its code gives other results for the same recipe and inputs, or its reference another
# shape.  Versions of libraries are deliberately absent: upgrading one does not throw away a finished training run, and
# where it changes bytes the outputs' digests say so.
STAGE_VERSIONS = {"shard": 4, "train": 3, "evaluate": 13, "register": 3, "sweep": 3}

_LAST_WRITTEN = {  # of what a reference points at: the file that is published last
    DatasetRef: "manifest.json",
    RunRef: "manifest.json",
    SweepRef: "sweep.json",
    EvaluationRef: "report.json",
    ReportRef: "report.json",
    ModelRef: "bundle.json",
}

Ref = TypeVar("Ref", DatasetRef, RunRef, SweepRef, EvaluationRef, ReportRef, ModelRef)


class _Work(Frozen):
    key: str
    kind: str
    ref: dict


def work_key(stage: str, recipe: BaseModel | dict, inputs: tuple[str, ...] = ()) -> str:
    """Identity of a piece of work: sha256 (64 hex digits) of stage, version of its code, recipe, digests of its inputs.

    recipe: the part of the recipe that changes the stage's numbers, and nothing else, or finished work is done again.
    """
    if stage not in STAGE_VERSIONS:
        raise ValueError(f"stage {stage!r} has no version; there are {', '.join(STAGE_VERSIONS)}")
    return digest_of(
        {"stage": stage, "version": STAGE_VERSIONS[stage], "recipe": digest_of(recipe), "inputs": list(inputs)}
    )


def work_path(store: Path, key: str) -> Path:
    """Where the reference of a finished work lies."""
    return Path(store) / "works" / f"{key}.json"


def remember(store: Path, key: str, ref: Ref) -> Ref:
    """Note that the work `key` gave `ref`, atomically, and return `ref`.  Call it after `ref`'s folder is published."""
    missing = _missing(ref)
    if missing:
        raise ValueError(f"{missing} does not exist: publish a result before remembering it")
    work = _Work(key=key, kind=type(ref).__name__, ref=ref.model_dump(mode="json"))
    with room_in(work_path(store, key).parent, "the note of finished work"):
        write_atomic(work_path(store, key), canonical_json(work))
    return ref


def recall(store: Path, key: str, kind: type[Ref]) -> Ref | None:
    """What the work `key` gave, or None where it was never finished, or what it published is gone.

    Whether the published bytes are still the same is for their reader to verify.  Raises ValueError for a file that
    is no reference of this kind.
    """
    try:
        ref = finished(work_path(store, key), kind)
    except FileNotFoundError:
        return None
    return None if _missing(ref) else ref


def finished(path: Path, wanted: type[Ref] | None = None) -> Ref:
    """The reference in a file of the store's `works`, `wanted` or of whatever kind; what it points at may be gone.

    Raises FileNotFoundError, and ValueError for a file that is none, or another work's.
    """
    data = path.read_bytes()
    try:
        work = _Work.model_validate_json(data)
        kind = next((kind for kind in _LAST_WRITTEN if kind.__name__ == work.kind), None)
        if kind is None or wanted not in (None, kind) or work.key != path.stem:
            raise ValueError(f"it is a {work.kind} of the work {work.key[:12]}")
        return kind.model_validate_json(canonical_json(work.ref))
    except ValueError as error:
        what = f"is not the {wanted.__name__ if wanted else 'reference'} of the work {path.stem[:12]}"
        raise ValueError(f"{path} {what}: {first_mistake(error)}. Delete this file and run the stage again.") from error


def digested(ref: Ref) -> str:
    """Path of the file whose sha256 is the digest of `ref` (of a dataset's without the line's end)."""
    return f"{ref.uri}/{_LAST_WRITTEN[type(ref)]}"


def _missing(ref: Ref) -> str | None:
    """The first file that `ref` needs and that is not there."""
    needed = [(ref.uri, _LAST_WRITTEN[type(ref)])]
    if isinstance(ref, EvaluationRef):
        needed.append((ref.bundle_uri, _LAST_WRITTEN[ModelRef]))
    return next((f"{uri}/{name}" for uri, name in needed if open_storage(uri).size(name) is None), None)
