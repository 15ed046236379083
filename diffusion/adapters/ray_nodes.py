"""What the nodes of a Ray cluster have of what runs need there: this program, its libraries, the home."""

import hashlib
import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diffusion.adapters.ray_cluster import connected

LIBRARIES = ("torch", "mlflow")
_MOST_NODES = 32  # that are asked
_PATIENCE_S = 45.0
_PACKAGES = ("diffusion", "flows")


def code_digest() -> str | None:
    """sha256 of this program's files of Python as they would be imported here, 64 hex digits; None where there are none."""
    digest = hashlib.sha256()
    for package in _PACKAGES:  # each may lie in a folder of its own
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            return None
        folder = Path(found.origin).parent
        for path in sorted(folder.rglob("*.py")):
            data = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(folder).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def tell() -> None:
    """The program of `flows.doctor.cluster`: reads what is asked from its input, prints what the nodes say.  Errors are
    Ray's own, on standard error."""
    asked = json.load(sys.stdin)
    with connected(asked["ray"], ship=asked["ray_ship"]):
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        whole = ray.cluster_resources()
        told = {
            "ray": ray.__version__,
            "alive": len(nodes),
            "cpus": whole.get("CPU", 0),
            "gpus": whole.get("GPU", 0),
            "nodes": _asked(nodes[:_MOST_NODES], asked["marker"], asked["s3"]),
        }
    print(json.dumps(told), flush=True)


def _asked(nodes: list[dict], marker: str, s3: bool) -> list[dict]:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # by value: a node that lacks this program could not import the function
    look = ray.remote(num_cpus=0, max_retries=0)(_by_value(_look))
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        asked[look.options(scheduling_strategy=there).remote(marker, s3)] = node["NodeManagerAddress"]
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE_S)
    found = []
    for answer, address in asked.items():
        said = {"address": address, "error": None}
        if answer not in set(done):
            found.append(said | {"error": f"no answer within {_PATIENCE_S:g} s"})
            continue
        try:
            found.append(said | ray.get(answer))
        except RayError as error:
            found.append(said | {"error": str(error).strip().splitlines()[-1]})
    return found


def _by_value(function):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return function


def _look(marker: str, s3: bool) -> dict:
    """On a node: what is there.  marker: a file in the home, "" where there is none to look for."""
    said = {"code": code_digest(), "home": not marker or os.access(marker, os.W_OK), "credentials": True}
    for library in LIBRARIES:
        try:
            said[library] = version(library)
        except PackageNotFoundError:
            said[library] = None
    if s3:
        import boto3

        said["credentials"] = boto3.session.Session().get_credentials() is not None
    return said
