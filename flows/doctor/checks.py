"""The list of checks, in the order in which their findings are told."""

from flows.doctor import (
    clock,
    cluster,
    endpoint,
    files,
    machine,
    mlflow_server,
    permissions,
    places,
    prefect_server,
    registry,
    versions,
)
from flows.doctor.finding import Check

_NETWORK = "look at the network and at the server's own log; a server that is overloaded may need more processes"

CHECKS = (
    Check("home", files.home, 10, "its disk hangs: look at the mount with `df` and `dmesg`"),
    Check("left-overs", files.left_overs, 10, "the home has very many files: `diffusion verify` looks at all, slowly"),
    Check("permissions", permissions.permissions, 5, "its disk hangs: look at the mount with `df` and `dmesg`"),
    Check("machine", machine.limits, 5, "look at the machine with `dmesg`", machine=True),
    Check("torch", machine.torch, 60, "the driver hangs: `nvidia-smi`, then reboot the machine", machine=True),
    Check("versions", versions.versions, 20, "the disk of the environment is slow: try again", machine=True),
    Check("prefect", prefect_server.prefect, 20, _NETWORK),
    Check("mlflow", mlflow_server.mlflow, 30, _NETWORK),
    Check("registry", registry.registry, 60, _NETWORK),
    Check("ray", cluster.ray, 90, "look at the cluster with `ray status`; its nodes may be starting or all busy"),
    Check("places", places.places, 60, _NETWORK),
    Check("clock", clock.clock, 15, _NETWORK),
    Check(
        "endpoint", endpoint.endpoint, 15, "end the program that holds the port, or choose another: DIFFUSION_PORT=N"
    ),
)
