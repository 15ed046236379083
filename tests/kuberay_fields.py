"""The fields of KubeRay's objects that our manifests use, by the API reference of KubeRay 1.7
[ray-project/kuberay, docs/reference/api.md, tag v1.7.0, Apache-2.0].  Any other is a misspelt one.

`tests/test_infra.py` holds the manifests against this, and both against the published CRDs where there is a folder of them.
"""

from typing import Any

ANY = object()  # what is looked at elsewhere
POD = object()  # a PodTemplateSpec, held against Kubernetes' own schema
TEXT = {str: str}

CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": {"token"}, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v2"},
        "idleTimeoutSeconds": int,
        "resources": ANY,
        "securityContext": ANY,
        "volumeMounts": ANY,
    },
    "headGroupSpec": {"rayStartParams": TEXT, "template": POD},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": TEXT,
            "template": POD,
        }
    ],
}
JOB = {
    "clusterSelector": TEXT,
    "submissionMode": {"HTTPMode"},
    "entrypoint": str,
    "activeDeadlineSeconds": int,
}
KINDS = {
    "RayCluster": CLUSTER,
    "RayJob": JOB,
    "RayCronJob": {"schedule": str, "timeZone": str, "jobTemplate": JOB},
    "RayService": {
        "upgradeStrategy": {
            "type": {"NewCluster", "NewClusterWithIncrementalUpgrade"},
            "clusterUpgradeOptions": {
                "gatewayClassName": str,
                "stepSizePercent": int,
                "intervalSeconds": int,
                "maxSurgePercent": int,
            },
        },
        "rayClusterDeletionDelaySeconds": int,
        "excludeHeadPodFromServeSvc": bool,
        "serveConfigV2": str,
        "rayClusterConfig": CLUSTER,
    },
}


def mistakes(value: Any, shape: Any, path: str) -> list[str]:
    """Where a value has another field, type or word than its shape."""
    if shape is ANY or shape is POD:
        return []
    if isinstance(shape, set):
        return [] if value in shape else [f"{path}: {value!r} is none of {sorted(shape)}"]
    if isinstance(shape, list):
        return [found for i, each in enumerate(value) for found in mistakes(each, shape[0], f"{path}[{i}]")]
    if shape is TEXT:
        return [f"{path}.{key}: {each!r} is no text" for key, each in value.items() if not isinstance(each, str)]
    if isinstance(shape, dict):
        wrong = [f"{path}.{key}: KubeRay has no such field" for key in value.keys() - shape.keys()]
        known = [key for key in value if key in shape]
        return wrong + [found for key in known for found in mistakes(value[key], shape[key], f"{path}.{key}")]
    return [] if type(value) is shape else [f"{path}: {value!r} is no {shape.__name__}"]


def fields(shape: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field of a shape."""
    if isinstance(shape, list):
        return fields(shape[0], (*path, "[]"))
    if not isinstance(shape, dict) or shape is TEXT:
        return [path]
    return [found for key, each in shape.items() for found in fields(each, (*path, key))]
