"""What is installed, against what this program needs and what it was tested with."""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from flows.doctor.finding import Asked, Finding, ok, warning, wrong

PROGRAM = "diffusion-pipeline"
LOCK = Path(__file__).parents[2] / "requirements.lock"  # beside the program, where that is a clone
_PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*==\s*([A-Za-z0-9.!+_-]+)")
_MOST = 6  # that are named


def versions(asked: Asked) -> Iterator[Finding]:
    broken = list(out_of_range())
    for name, there, needed in broken[:_MOST]:
        has = f"{name} {there}" if there else f"no {name}"
        yield wrong("versions", f"{has} is installed, and {needed} is needed", f"`pip install '{needed}'`")
    if not asked.lock.is_file():
        yield warning("versions", f"there is no {asked.lock} to compare with", "`diffusion doctor --lock FILE`")
        return
    others = [skew for skew in skewed(pins(asked.lock)) if skew[0] not in {name for name, _, _ in broken}]
    if others:
        words = ", ".join(f"{name} {there} (tested: {pinned})" for name, there, pinned in others[:_MOST])
        more = f" and {len(others) - _MOST} more" if others[_MOST:] else ""
        wanted = " ".join(f"{name}=={pinned}" for name, _, pinned in others[:_MOST])
        mend = f"`pip install {wanted}`" if not more else f"`pip install -r {asked.lock}`"
        yield warning("versions", f"not those that this program was tested with: {words}{more}", mend)
    elif not broken:
        yield ok("versions", f"those of {asked.lock.name}")


def pins(lock: Path) -> dict[str, str]:
    """Package -> version, of a lock file with or without hashes."""
    found = (_PIN.match(line) for line in lock.read_text("utf-8").splitlines())
    return {canonicalize_name(pin[1]): pin[2] for pin in found if pin}


def skewed(pinned: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Name, version that is installed, version of the lock, where they differ.  Not those that are not installed: the tests'
    are needed by nobody else.  A build's own part (+cpu) makes no difference."""
    for name, wanted in sorted(pinned.items()):
        try:
            there = version(name)
        except PackageNotFoundError:
            continue
        if Version(there).public != Version(wanted).public:
            yield name, there, wanted


def out_of_range() -> Iterator[tuple[str, str | None, str]]:
    """Name, version that is installed or None, requirement, of this program's own ones that are not met."""
    try:
        needed = [Requirement(text) for text in requires(PROGRAM) or ()]
    except PackageNotFoundError:  # it was not installed, but is run from its folder
        return
    for each in needed:
        if each.marker and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(each.name)
        except PackageNotFoundError:
            yield canonicalize_name(each.name), None, f"{each.name}{each.specifier}"
            continue
        if not each.specifier.contains(there, prereleases=True):
            yield canonicalize_name(each.name), there, f"{each.name}{each.specifier}"
