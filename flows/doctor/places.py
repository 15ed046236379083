"""Where datasets, checkpoints, bundles and MLflow's files are kept: a bucket or a folder in which we may do what runs do."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from diffusion.store.retry import Patience
from diffusion.store.s3 import S3Prefix
from diffusion.store.storage import S3_SCHEME, StorageRefused, StorageUnavailable
from flows.doctor.files import writable
from flows.doctor.finding import Asked, Finding, ok, told, wrong

_PATIENCE = Patience(attempts=2, first_s=0.2, longest_s=0.5, total_s=8, connect_s=3, silent_s=5)
_KINDS = ("data", "runs", "bundles")


def places(asked: Asked) -> Iterator[Finding]:
    """Of the site's own; those of MLflow's server `mlflow_server` finds."""
    named = {kind: getattr(asked.site, kind) for kind in _KINDS}
    for where in dict.fromkeys(filter(None, named.values())):
        kinds = ", ".join(kind for kind in _KINDS if named[kind] == where)
        yield from place(kinds, where)
    if not any(named.values()):
        yield ok("places", "datasets, checkpoints and bundles are in the home")


def place(check: str, where: str) -> Iterator[Finding]:
    """check: what is kept there."""
    if where.startswith(S3_SCHEME):
        yield from _bucket(check, where)
    else:
        folder = Path(where)
        yield writable(check, folder, f"give this user the right to write there, `chmod u+rwx {folder}` as its owner")


def _bucket(check: str, where: str) -> Iterator[Finding]:
    """List, put, read, remove: what is not allowed is told with the permission that is missing, each once."""
    storage, name, data = S3Prefix(where, patience=_PATIENCE), f"doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    found: dict[str, Finding] = {}

    def tried(act: Callable[[], object]) -> object:
        try:
            return act()
        except StorageRefused as error:
            finding = told(check, error)
            found.setdefault(finding.mend, finding)
        except StorageUnavailable as error:
            what = str(error).partition(". Nothing is lost")[0]
            finding = wrong(check, what, "start the server, or correct AWS_ENDPOINT_URL; then look at the network")
            found.setdefault(finding.mend, finding)
        return None

    tried(lambda: next(storage.walk(), None))
    if not any(key for key in found if "permission" not in key):  # nothing else would be answered otherwise
        tried(lambda: storage.put(name, data))
        if not found:
            try:
                back = tried(lambda: storage.read(name))
            except FileNotFoundError:
                back = b""
            if not found and back != data:
                what = f"{where} gives back other bytes than it was given"
                found[what] = wrong(check, what, "use a server that is consistent: what was put is there at once")
        tried(lambda: storage.remove(name))
    yield from found.values() or (ok(check, f"{where}: list, put, read and remove"),)
