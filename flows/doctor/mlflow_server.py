"""MLflow: its server or its database, and whether files of models can be kept."""

import json
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from diffusion.adapters.mlflow_schema import Unreachable, newest_schema, schema_of
from diffusion.serving.keys import is_loopback
from flows.doctor.finding import Asked, Finding, ok, warning, wrong
from flows.doctor.http import Answer, Silent, ask, mlflow_headers
from flows.doctor.places import place
from flows.site_file import hidden

_HTTP = ("http://", "https://")
_API = "api/2.0/mlflow"
_START = "start it, `mlflow server --backend-store-uri ... --artifacts-destination ...` (docs/registry.md)"


def mlflow(asked: Asked) -> Iterator[Finding]:
    uri = asked.site.mlflow_uri
    if uri.startswith(_HTTP):
        try:
            yield from _server(uri.rstrip("/"))
        except Silent as silent:
            yield wrong("mlflow", str(silent), f"{_START}, or unset DIFFUSION_MLFLOW to do without a server")
    else:
        yield _database(uri)


def _database(uri: str) -> Finding:
    shown = hidden("", uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return ok("mlflow", f"embedded: MLflow {version('mlflow')} makes {shown} when it is first needed")
    try:
        found, newest = schema_of(uri), newest_schema()
    except Unreachable as error:
        return wrong("mlflow", f"{shown} cannot be read ({error})", "start the database, or correct DIFFUSION_MLFLOW")
    if found is None:
        return ok("mlflow", f"{shown} is empty: MLflow makes its tables when it is first used")
    if found != newest:
        backup = "after a backup of it"
        what = f"the tables of {shown} are of another version of MLflow ({found}; {version('mlflow')} has {newest})"
        return wrong("mlflow", what, f"`mlflow db upgrade '{shown}'`, {backup}; where it is newer, install its MLflow")
    return ok("mlflow", f"{shown}: its tables are those of MLflow {version('mlflow')}")


def _server(url: str) -> Iterator[Finding]:
    said, trouble = _standing(url)
    if trouble is not None:
        yield trouble
        return
    ours = version("mlflow")
    if said.split(".")[:2] != ours.split(".")[:2]:
        what = f"the server at {url} is MLflow {said}, and this program has {ours}"
        yield warning(
            "mlflow", what, f"`pip install mlflow=={ours}` on the server, `mlflow db upgrade URI`, start it again"
        )
    else:
        yield ok("mlflow", f"{url} answers: MLflow {said}, and its database")
    yield from _files(url, mlflow_headers())


def stands(uri: str) -> bool:
    """Whether it can be asked for more; where not, `mlflow` says why."""
    if not uri.startswith(_HTTP):
        return _database(uri).state == "ok"
    try:
        return _standing(uri.rstrip("/"))[1] is None
    except Silent:
        return False


def _standing(url: str) -> tuple[str, Finding | None]:
    """A server's version, and what keeps it from answering questions.  Raises Silent."""
    headers = mlflow_headers()
    told = ask(f"{url}/version", headers=headers)
    said = told.body.decode(errors="replace").strip()
    if told.status in (401, 403):
        return said, _refused(url, told)
    if told.status != 200 or not said[:1].isdigit() or len(said) > 40:
        what = f"{url} is no MLflow server ({told.status} for {url}/version)"
        return said, wrong("mlflow", what, "correct DIFFUSION_MLFLOW")
    found = ask(
        f"{url}/{_API}/experiments/search",
        method="POST",
        body=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    if found.status in (401, 403):
        return said, _refused(url, found)
    if found.status != 200:
        why = f"{found.status}: {_why(found.json)}"
        what = f"the server at {url} does not reach its database, or has none of its version ({why})"
        mend = "start the database; `mlflow db upgrade URI` on the server, after a backup"
        return said, wrong("mlflow", what, mend)
    return said, None


def _files(url: str, headers: dict[str, str]) -> Iterator[Finding]:
    """Where a new experiment's files would go: one is put there, read, and removed."""
    default = ask(f"{url}/{_API}/experiments/get?experiment_id=0", headers=headers).json or {}
    where = str(default.get("experiment", {}).get("artifact_location", "")) if isinstance(default, dict) else ""
    if where.startswith("s3://"):
        yield from place("mlflow files", where)
    elif where.startswith("mlflow-artifacts:"):
        yield _through(url, headers)
    elif where and not is_loopback(urlsplit(url).hostname or ""):
        what = f"the server at {url} has clients keep files at {where}, a folder of theirs and not of the server"
        yield wrong(
            "mlflow files", what, "start it with `--artifacts-destination s3://bucket/mlflow` (docs/registry.md)"
        )


def _through(url: str, headers: dict[str, str]) -> Finding:
    name, data = f"diffusion-doctor/{uuid.uuid4().hex}", uuid.uuid4().bytes
    file = f"{url}/api/2.0/mlflow-artifacts/artifacts/{name}"
    put = ask(file, method="PUT", body=data, headers={"Content-Type": "application/octet-stream", **headers})
    mend = "look at the server's log: its `--artifacts-destination`, and its AWS_* variables where that is a bucket"
    if put.status != 200:
        return wrong("mlflow files", f"{url} cannot keep files ({put.status}: {_why(put.json)})", mend)
    got = ask(file, headers=headers)
    ask(file, method="DELETE", headers=headers)
    if got.body != data:
        return wrong("mlflow files", f"{url} gives back other bytes than it was given ({got.status})", mend)
    return ok("mlflow files", f"{url} keeps files")


def _refused(url: str, answer: Answer) -> Finding:
    if b"Host" in answer.body:
        what = f"the server at {url} does not know that name of itself ({answer.status})"
        return wrong("mlflow", what, f"start it with `--allowed-hosts {urlsplit(url).netloc}`")
    mend = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    return wrong("mlflow", f"the server at {url} does not let us in ({answer.status})", f"set {mend}")


def _why(answer: object) -> str:
    words = answer.get("message") or answer.get("error_code") if isinstance(answer, dict) else None
    return " ".join(str(words or "it does not say why").split())[:200]
