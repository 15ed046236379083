"""Writes common.txt, cpu.txt and cuda.txt beside this file: what the image is made of, each file held to its sha256; and
audit.txt, of what `make audit` asks with.

    python infra/requirements/lock.py        # as `make image-lock` does

Versions are those of requirements.lock; which packages, pip decides from pyproject.toml.  Only metadata is downloaded:
pip tells the index's sha256 of the file that each platform would get.  torch's build for CPUs is on PyTorch's own index
alone; where that cannot be reached cpu.txt stays, if its version does.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = "3.11"  # of the Dockerfile
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # of whoever works here
EXTRAS = ("text", "traces")
ALSO = (
    "psycopg[binary]",
    "setuptools>=77",
)  # of MLflow's server on PostgreSQL; what builds this project, and torch wants
PYTORCH = "https://download.pytorch.org/whl/cpu"
GLIBC = 41  # 2.41, of Debian trixie
CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


def tags(machine: str) -> list[str]:
    """Platforms whose wheels run there, the best first."""
    return [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 16, -1)] + [f"manylinux2014_{machine}"]


def asked(machine: str, wanted: list[str], *options: str, python: str = PYTHON) -> dict[str, tuple[str, str]]:
    """What pip would install there: name -> version, sha256.  Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            "-",
        ]
        command += ["--disable-pip-version-check", "--only-binary=:all:", f"--target={folder}"]
        command += [f"--python-version={python}", "--implementation=cp"]
        command += [f"--platform={tag}" for tag in tags(machine)]
        done = subprocess.run([*command, *options, *wanted], stdout=subprocess.PIPE, check=True)
    found = {}
    for each in json.loads(done.stdout)["install"]:
        metadata, digest = each["metadata"], each["download_info"]["archive_info"]["hashes"]["sha256"]
        found[re.sub(r"[-_.]+", "-", metadata["name"]).lower()] = metadata["version"], digest
    return found


def written(name: str, head: str, pins: dict[str, tuple[str, list[str]]], python: str = PYTHON) -> None:
    lines = [f"{package}=={version}" + "".join(f" \\\n    --hash=sha256:{sha256}" for sha256 in sorted(set(digests)))
             for package, (version, digests) in sorted(pins.items())]  # fmt: skip
    (HERE / name).write_text(f"# Made by lock.py for Python {python}.  {head}\n" + "\n".join(lines) + "\n")


def cpu(torch: str) -> None:
    """torch for CPUs, by its address on PyTorch's index: as a second index it would be asked for every package."""
    version = f"{torch}+cpu"
    index = (f"--index-url={PYTORCH}", "--extra-index-url=", "--no-deps")
    lines = []
    for machine in ("x86_64", "aarch64"):
        try:
            sha256 = asked(machine, [f"torch=={version}"], *index)["torch"][1]
        except subprocess.CalledProcessError:
            if f"/torch-{version.replace('+', '%2B')}-" not in (HERE / "cpu.txt").read_text():
                raise SystemExit(f"{PYTORCH} does not answer, and cpu.txt is of another torch than {version}") from None
            print(f"{PYTORCH} does not answer: cpu.txt stays as it is")
            return
        tag = f"cp{PYTHON.replace('.', '')}"
        url = f"{PYTORCH}/torch-{version.replace('+', '%2B')}-{tag}-{tag}-manylinux_2_28_{machine}.whl"
        lines.append(f'torch @ {url} ; platform_machine == "{machine}" \\\n    --hash=sha256:{sha256}\n')
    head = f"# Made by lock.py for Python {PYTHON}.  amd64 and arm64, without a GPU.\n-r common.txt\n"
    (HERE / "cpu.txt").write_text(head + "".join(lines))


def audit() -> None:
    """What the auditor is made of: packages that are locked in their versions, others in the newest."""
    pins: dict[str, tuple[str, list[str]]] = {}
    for python in PYTHONS:
        for machine in ("x86_64", "aarch64"):
            found = asked(machine, ["pip-audit"], f"--constraint={ROOT / 'requirements.lock'}", python=python)
            for package, (version, sha256) in found.items():
                pins.setdefault(package, (version, []))[1].append(sha256)
    written("audit.txt", "pip-audit, on Linux.", pins, " to ".join((PYTHONS[0], PYTHONS[-1])))


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in EXTRAS for each in project["optional-dependencies"][extra]]
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    torch = locked["torch"]
    wanted = [*project["dependencies"], *extras, *ALSO, f"torch==={torch}"]
    options = (f"--constraint={ROOT / 'requirements.lock'}",)
    amd, arm = asked("x86_64", wanted, *options), asked("aarch64", wanted, *options)
    common: dict[str, tuple[str, list[str]]] = {}
    for package, (version, sha256) in [*amd.items(), *arm.items()]:
        if not CUDA.fullmatch(package):
            common.setdefault(package, (version, []))[1].append(sha256)
    written("common.txt", "amd64 and arm64; torch comes from cpu.txt or cuda.txt.", common)
    gpu = {package: (version, [sha256]) for package, (version, sha256) in amd.items() if CUDA.fullmatch(package)}
    written("cuda.txt", "amd64 with NVIDIA GPUs: PyPI's build of torch.\n-r common.txt", gpu)
    cpu(torch)
    audit()


if __name__ == "__main__":
    main()
