"""This machine: Python, limits of the system, shared memory; torch's build and the GPUs."""

import importlib.util
import os
import resource
import runpy
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from flows.doctor.finding import Asked, Finding, ok, warning, wrong
from flows.site import Site

_PYTHON = (3, 11)
_OPEN_FILES = 4_096  # below it Ray warns: each of its processes holds connections to many others
_SHM_BYTES = 2**30
_SHM = Path("/dev/shm")
_DRIVER = Path("/proc/driver/nvidia/version")
_CUDA_INDEX = "https://pytorch.org/get-started/locally"


class Build(NamedTuple):
    """Of torch.  cuda: the version that it was built for, None of one for CPUs."""

    version: str
    cuda: str | None


def limits(asked: Asked) -> Iterator[Finding]:
    running = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _PYTHON:
        yield wrong(
            "python", f"Python {running} runs this, 3.11 is the oldest that can", "`make PYTHON=/path/to/python3.11`"
        )
    else:
        yield ok("python", f"Python {running}")
    yield open_files()
    yield from _memory_limit()
    if asked.site.ray is None:
        yield shared_memory(_SHM)


def open_files() -> Finding:
    """Ray raises the limit of its own processes as far as the hard one allows, so that one counts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES:
        return ok("open files", "as many as Ray wants")
    mend = "LimitNOFILE=65536 of a service, `docker run --ulimit nofile=65536`, or /etc/security/limits.conf"
    return warning("open files", f"a process may have {hard:,} files open, and Ray wants {_OPEN_FILES:,}", mend)


def _memory_limit() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        what = f"`ulimit -v` gives a process {limit // 2**20:,} MiB of addresses: Ray wants more, and is ended"
        yield wrong("address space", what, "`ulimit -v unlimited`")


def shared_memory(folder: Path) -> Finding:
    """Where Ray's object store lies, else in files, which is slow."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return warning(
            "shared memory", f"{folder} is not there: Ray's objects go to a disk", f"mount a tmpfs at {folder}"
        )
    size = status.f_blocks * status.f_frsize
    if size < _SHM_BYTES:
        what = f"{folder} has {size / 2**20:,.0f} MiB: Ray's objects go to a disk, which is slow"
        return warning(
            "shared memory", what, f"`docker run --shm-size=4g`, or as root `mount -o remount,size=4G {folder}`"
        )
    return ok("shared memory", f"{folder} has {size / 2**30:,.1f} GiB")


def torch(asked: Asked) -> Iterator[Finding]:
    """Its build fits the machine and the site, and where there are GPUs each is asked to compute.  torch is imported only
    there: that takes seconds."""
    build = torch_build()
    if build is None:
        yield wrong("torch", "torch is not installed", "`pip install -r requirements.lock`")
        return
    driver = driver_version(_DRIVER)
    yield from judged(build, driver, asked.site)
    if driver and build.cuda:
        yield from _gpus(build, driver)


def judged(build: Build, driver: str | None, site: Site) -> Iterator[Finding]:
    """What can be said before a GPU is asked.  driver: NVIDIA's, None where there is none."""
    cpu = f"torch {build.version}, for CPUs"
    if driver and not build.cuda and site.gpu is not False:
        what = f"{cpu}, and this machine has NVIDIA's driver {driver}: its GPUs are not used"
        mend = f"install its build for CUDA ({_CUDA_INDEX}), or"
        yield warning("torch", what, f"{mend} DIFFUSION_GPU=false, if they are not to be")
    elif site.gpu and not build.cuda:
        yield wrong(
            "torch", f"{cpu}, and DIFFUSION_GPU=true", f"install its build for CUDA ({_CUDA_INDEX}), or unset that"
        )
    elif site.gpu and not driver:
        what = f"torch {build.version}, for CUDA {build.cuda}, but no NVIDIA driver is loaded, and DIFFUSION_GPU=true"
        yield wrong("torch", what, "install NVIDIA's driver (`nvidia-smi` then lists GPUs), or unset DIFFUSION_GPU")
    elif not build.cuda:
        yield ok("torch", cpu)
    elif not driver:
        yield ok("torch", f"torch {build.version}, for CUDA {build.cuda}; no GPU here, so the CPU works")


def _gpus(build: Build, driver: str) -> Iterator[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        why = next((str(each.message).split(". ")[0] for each in said), "torch does not say why")
        what = f"torch {build.version}, for CUDA {build.cuda}, sees no GPU with driver {driver}: {why}"
        old = f"a newer driver, one for CUDA {build.cuda} or later (`nvidia-smi` says for which it is)"
        yield wrong("gpu", what, f"install {old}, or torch's build for the driver's CUDA ({_CUDA_INDEX})")
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        try:
            ones = torch.ones(64, 64, device=f"cuda:{number}")
            right = bool((ones @ ones == 64).all())
            free, whole = torch.cuda.mem_get_info(number)
        except RuntimeError as error:  # out of memory, or a build without code for this GPU
            yield wrong("gpu", f"GPU {number}, {name}, does not compute: {str(error).splitlines()[0]}", "`nvidia-smi`")
            continue
        if not right:
            yield wrong("gpu", f"GPU {number}, {name}, computes wrongly", "`nvidia-smi -q -d ECC`, and take it out")
        else:
            yield ok(
                "gpu", f"GPU {number}, {name}, {free / 2**30:.0f} of {whole / 2**30:.0f} GiB free, driver {driver}"
            )


def torch_build() -> Build | None:
    """Of the torch that is installed, without importing it."""
    found = importlib.util.find_spec("torch")
    try:
        file = Path(found.origin).with_name("version.py") if found else None
        if file is not None and file.is_file():
            facts = runpy.run_path(str(file))
            return Build(facts["__version__"], facts.get("cuda"))
        return Build(version("torch"), None)
    except PackageNotFoundError:
        return None


def driver_version(file: Path) -> str | None:
    """NVIDIA's kernel driver's, by what it says of itself; None where none is loaded."""
    try:
        words = file.read_text().partition("Kernel Module")[2].split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit()), "of unknown version")
