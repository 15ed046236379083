"""Ray: one of our own needs nothing; a cluster is reached, is of our versions, and its nodes have what runs need."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from diffusion.adapters.ray_nodes import LIBRARIES, code_digest
from diffusion.store.publish import PREFIX
from diffusion.store.storage import S3_SCHEME
from flows.doctor.finding import Asked, Finding, ok, warning, wrong
from flows.doctor.http import Silent, ask
from flows.site import JOBS, Site

_CONNECT_S = 3.0
_LIMIT_S = 75.0


class _Said(NamedTuple):
    code: int | None  # None: it took too long
    out: str
    errors: str


def ray(asked: Asked) -> Iterator[Finding]:
    site = asked.site
    if site.ray is None:
        yield ok("ray", f"embedded: Ray {version('ray')} is started when it is needed")
        return
    if (silent := _silent(site.ray)) is not None:
        without = "or unset DIFFUSION_RAY to have one of our own"
        mend = f"start it, `ray start --head --port PORT` on its head, correct DIFFUSION_RAY, {without}"
        yield wrong("ray", f"nothing answers at {site.ray} ({silent})", mend)
        return
    if site.ray.startswith(JOBS):
        yield _jobs(site.ray.rstrip("/"))
        return
    with _marker(site) as marker:
        said = _asked(site, marker)
    if said.code != 0:
        yield _refused(site.ray, said)
        return
    yield from _nodes(json.loads(said.out.splitlines()[-1]), site)


def _jobs(url: str) -> Finding:
    """Of a cluster that takes jobs: what its nodes have shows when one runs."""
    token = os.environ.get("RAY_AUTH_TOKEN") or _read(
        Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    )
    try:
        told = ask(f"{url}/api/version", headers={"Authorization": f"Bearer {token}"} if token else {})
    except Silent as silent:
        return wrong(
            "ray", str(silent), "start the cluster with its dashboard, `ray start --head --include-dashboard=true`"
        )
    if told.status in (401, 403):
        return wrong("ray", f"the cluster at {url} does not let us in ({told.status})", _TOKEN)
    theirs = told.json.get("ray_version") if isinstance(told.json, dict) else None
    if theirs is None:
        return wrong("ray", f"{url} takes no jobs ({told.status} for {url}/api/version)", "correct DIFFUSION_RAY")
    if theirs != version("ray"):
        return wrong("ray", f"the cluster at {url} has Ray {theirs}, and this program {version('ray')}", _same())
    return ok("ray", f"{url} takes jobs: Ray {theirs}")


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text().strip()
    except OSError:
        return ""


@contextmanager
def _marker(site: Site) -> Iterator[str]:
    """Path of a file in the home, for nodes to look for; "" where there is no home yet, or none that can be written."""
    with ExitStack() as stack:
        marker = ""
        with suppress(OSError):
            marker = stack.enter_context(tempfile.NamedTemporaryFile(dir=site.home, prefix=PREFIX)).name
        yield marker


def _silent(address: str) -> str | None:
    """Why nothing answers; None where something does, or the address does not say where."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not (host and port.isdigit()):  # "auto"
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _asked(site: Site, marker: str) -> _Said:
    """In a process of its own: Ray ends one that it does not like, waits long, and writes much."""
    s3 = any(place and place.startswith(S3_SCHEME) for place in (site.data, site.runs, site.bundles))
    asked = {"ray": site.ray, "ray_ship": site.ray_ship, "marker": marker, "s3": s3}
    process = subprocess.Popen(
        [sys.executable, "-c", "from diffusion.adapters.ray_nodes import tell; tell()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**site.environment(), "RAY_NUM_REDIS_GET_RETRIES": "3", **os.environ},
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(json.dumps(asked), timeout=_LIMIT_S)
        return _Said(process.returncode, out, errors)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return _Said(None, "", "")


def _refused(address: str, said: _Said) -> Finding:
    lines = said.errors.strip().splitlines() or ["it does not say why"]
    if said.code is None:
        what = f"the cluster at {address} does nothing for us within {_LIMIT_S:g} s"
        return wrong("ray", what, "`ray status` on its head: its nodes may all be busy, or gone")
    if "Version mismatch" in said.errors:
        return wrong("ray", f"the cluster at {address} is of another version: {_mismatch(said.errors)}", _same())
    if "AuthenticationError" in said.errors:
        return wrong("ray", f"the cluster at {address} does not let us in", _TOKEN)
    return wrong("ray", f"the cluster at {address} cannot be used: {lines[-1][:300]}", "`ray status` on its head")


_TOKEN = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, with the cluster's token (`ray get-auth-token` there)"


def _same() -> str:
    return f"the same image on every node: Ray {version('ray')}, Python {'.'.join(map(str, sys.version_info[:3]))}"


def _mismatch(errors: str) -> str:
    """Ray's words for it, in a line."""
    rest = " ".join(errors.partition("Version mismatch:")[2].split()[:40])
    return rest.replace("The cluster was started with:", "it has").replace("This process on", "; this one, on")


def _nodes(said: dict, site: Site) -> Iterator[Finding]:
    """said: see `ray_nodes.tell`."""
    nodes, here = said["nodes"], code_digest()
    before = [f"{node['address']}: {node['error']}" for node in nodes if node["error"]]
    if before:
        yield wrong("ray nodes", "; ".join(before[:3]), "look at `ray status` and the logs of these nodes")
    nodes = [node for node in nodes if not node["error"]]
    lacking = [node["address"] for node in nodes if node["code"] is None]
    other = [node["address"] for node in nodes if node["code"] not in (None, here)]
    if lacking:
        what = f"this program is not installed on {_some(lacking)}"
        yield wrong("ray nodes", what, "install it there, or DIFFUSION_RAY_SHIP=true, which sends it with each run")
    if other:
        what = f"this program is another version on {_some(other)}"
        yield warning(
            "ray nodes", what, "install this one there, or DIFFUSION_RAY_SHIP=true, which sends it with each run"
        )
    for library in LIBRARIES:
        skewed = [
            f"{node['address']} ({node[library]})"
            for node in nodes
            if _public(node[library]) != _public(version(library))
        ]
        if skewed:
            what = f"{library} is {version(library)} here, and another on {_some(skewed)}"
            yield warning("ray nodes", what, f"`pip install {library}=={_public(version(library))}` on each")
    blind = [node["address"] for node in nodes if not node["home"]]
    if blind:
        what = f"{_some(blind)} cannot write {site.home}"
        yield wrong(
            "ray nodes", what, "put the home on a file system that all nodes mount there: DIFFUSION_HOME=/shared/..."
        )
    if poor := [node["address"] for node in nodes if not node["credentials"]]:
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY there, or a role; they are not sent with runs"
        yield wrong("ray nodes", f"{_some(poor)} finds no credentials for S3", mend)
    if not (lacking or blind or poor or before):
        gpus = f", GPUs {said['gpus']:g}" if said["gpus"] else ""
        yield ok("ray", f"{site.ray} answers: Ray {said['ray']}, nodes {said['alive']}, CPUs {said['cpus']:g}{gpus}")


def _public(found: str | None) -> str | None:
    return found and found.partition("+")[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more nodes" if names[3:] else "")
