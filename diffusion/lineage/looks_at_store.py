"""Looks at a home's store beside its datasets: checkpoints, bundles, reports, features, and the notes of finished work."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

import safetensors

from diffusion.evaluation import reference
from diffusion.evaluation.reference import ReferenceIdentity
from diffusion.lineage.looks import Finding, Look, Tell, asked, hashed, said
from diffusion.recipe import canonical_json, digest_of, first_mistake
from diffusion.store.averages import MANIFEST_NAME, Manifest
from diffusion.store.bundle_spec import HAD_AGAIN, SPEC_NAME, BundleSpec, bundle_path
from diffusion.store.lease import FOLDER as LEASES
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder, Storage, open_storage
from diffusion.store.works import digested, finished

_NAMED = {  # folders of folders named by the first digits of a file's sha256: that file, and what makes it
    "evaluations": ("report.json", "diffusion evaluate"),
    "sweeps": ("sweep.json", "diffusion sweep"),
}
TOPS = ("runs", "bundles", *_NAMED, "features", "works", LEASES)  # what a store has in it beside datasets
_features = Lock()  # a file of features is read at once, and there are large ones


def looks_at_store(store: Path) -> Iterator[Look]:
    """At all that is not of datasets."""
    root = LocalFolder(Path(store))
    yield from looks_at_runs(root)
    yield from looks_at_bundles(root)
    for top, (file, command) in _NAMED.items():
        for folder in _folders(root, top):
            yield from _report(root, f"{top}/{folder.name}/{file}", command)
    for found in root.walk("features/"):
        yield _kept_features(root, found.name, found.size)
    for found in root.walk("works/"):
        if not found.name.endswith(".lock"):
            yield _work(root, found.name, found.size)


def _folders(root: LocalFolder, top: str) -> list[Path]:
    return sorted(path for path in (root.folder / top).glob("*") if not path.name.startswith("."))


def looks_at_runs(root: Storage) -> Iterator[Look]:
    """At the checkpoints of a store, or at the copies of them that a site keeps elsewhere."""
    checkpoints: dict[str, dict[str, int]] = defaultdict(dict)
    for found in root.walk("runs/"):
        parts = found.name.split("/")
        if len(parts) == 5 and parts[2] == "checkpoints":  # beside them lie journals, which only grow
            checkpoints["/".join(parts[:4])][parts[4]] = found.size
    for place, files in checkpoints.items():
        yield from _checkpoint(root, place, files)


def _checkpoint(root: Storage, place: str, files: dict[str, int]) -> Iterator[Look]:
    uri = f"{root.uri}/{place}"
    remedy = f"Delete {uri} and run `diffusion train` again: it goes on from the checkpoint before it"
    if ".damaged-" in place.rpartition("/")[2]:
        yield said("unknown", uri, "it was found damaged, and set aside. Remove it")
        return
    if MANIFEST_NAME not in files:
        yield said("missing", f"{uri}/{MANIFEST_NAME}", remedy)
        return
    try:
        data = root.read(f"{place}/{MANIFEST_NAME}")
        manifest = Manifest.model_validate_json(data)
        if canonical_json(manifest) != data:
            raise ValueError("it is not in canonical form: it was edited")
    except ValueError as error:
        yield said("damaged", f"{uri}/{MANIFEST_NAME}", f"{error}. {remedy}")
        return
    if unnamed := set(manifest.ema.values()) - manifest.files.keys():
        yield said("damaged", f"{uri}/{MANIFEST_NAME}", f"it names no sum of {', '.join(sorted(unnamed))}. {remedy}")
    for name, file in manifest.files.items():
        yield hashed(root, f"{place}/{name}", file.sha256, files.get(name), remedy)
    for name in files.keys() - manifest.files.keys() - {MANIFEST_NAME}:
        yield said("unknown", f"{uri}/{name}", "the checkpoint's manifest does not name it. Remove it")


def looks_at_bundles(root: Storage) -> Iterator[Look]:
    """At the bundles of a store, or at those that a site keeps elsewhere for its registry."""
    folders: dict[str, dict[str, int]] = defaultdict(dict)
    for found in root.walk("bundles/"):
        place, _, name = found.name.rpartition("/")
        folders[place][name] = found.size
    for place, files in folders.items():
        yield from _bundle(root, place, files)


def _bundle(root: Storage, place: str, files: dict[str, int]) -> Iterator[Look]:
    uri = f"{root.uri}/{place}"
    remedy = f"Delete {uri}: {HAD_AGAIN}"
    if SPEC_NAME not in files:
        yield said("missing", f"{uri}/{SPEC_NAME}", remedy)
        return
    try:
        data = root.read(f"{place}/{SPEC_NAME}")
        if place != bundle_path(Path(), hashlib.sha256(data).hexdigest()).as_posix():
            raise ValueError("its sha256 is not what its folder's name says")
        spec = BundleSpec.model_validate_json(data)
    except ValueError as error:
        yield said("damaged", f"{uri}/{SPEC_NAME}", f"{first_mistake(error)}. {remedy}")
        return
    for name, sha256 in spec.weights.items():
        yield hashed(root, f"{place}/{name}", sha256, files.get(name), remedy)
    for name in files.keys() - spec.weights.keys() - {SPEC_NAME}:
        yield said("unknown", f"{uri}/{name}", f"{SPEC_NAME} does not name it. Remove it")


def _report(root: LocalFolder, name: str, command: str) -> Iterator[Look]:
    folder = root.path(name).parent
    remedy = f"Delete {folder} and run `{command}` again"
    size = root.size(name)
    if size is None:
        yield said("missing", str(root.path(name)), remedy)
        return

    def check() -> None:
        actual = hashlib.sha256(root.read(name)).hexdigest()
        if not actual.startswith(folder.name):
            raise ValueError(f"sha256 {actual[:16]}, as its folder's name does not say")

    yield asked(str(root.path(name)), size, check, remedy)


def _kept_features(root: LocalFolder, name: str, size: int) -> Look:
    path = root.path(name)

    def check() -> None:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["facts"])
            identity = ReferenceIdentity.model_validate_json(json.dumps(facts["identity"]))
        except (safetensors.SafetensorError, LookupError, TypeError) as error:
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
        if digest_of(identity) != path.stem:
            raise ValueError("it is not what its name says")
        with _features:
            try:
                reference.recall(root.folder, identity)
            except ValueError as error:
                raise ValueError("its numbers are not those that were written") from error

    return asked(str(path), size, check, "Delete it: it is computed again when it is needed")


def _work(root: LocalFolder, name: str, size: int) -> Look:
    path = root.path(name)

    def work(tell: Tell) -> list[Finding]:
        tell(size)
        try:
            ref = finished(path)
        except ValueError as error:
            return [Finding("damaged", str(path), str(error))]
        folder, _, file = digested(ref).rpartition("/")
        try:
            data = open_storage(folder).read(file)
        except FileNotFoundError:
            what = f"the {type(ref).__name__} of {folder}, which is not there. The stage does that work again"
            return [Finding("missing", f"{folder}/{file}", f"{path.name} notes {what}")]
        actual = hashlib.sha256(data.removesuffix(b"\n") if isinstance(ref, DatasetRef) else data).hexdigest()
        if actual != ref.digest:
            what = f"sha256 {actual[:12]}, {path.name} notes {ref.digest[:12]}"
            return [Finding("damaged", f"{folder}/{file}", f"{what}. Delete {folder}: the stage makes it again")]
        return []

    return Look(str(path), size, work)
