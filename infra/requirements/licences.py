"""Which licence each locked package has, whether it may, and the list of them for the image.

    python -m infra.requirements.licences            # what is wrong; exit code 1 where anything is
    python -m infra.requirements.licences --write    # and infra/NOTICE anew, as `make licences` does

A licence is what the installed package's metadata say: an SPDX expression, or older words that licences.toml knows.  Where
they do not say it, that file has what was read in the package's licence itself.  All licences of an expression must be
allowed for the package, also where it offers a choice.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NOTICE = ROOT / "infra" / "NOTICE"
RULES = tomllib.loads((HERE / "licences.toml").read_text())
_OPERATORS = {"AND", "OR", "WITH"}


class Unknown(Exception):
    """Nobody said which licence a package has; says what to do."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    """Package -> version of requirements.lock."""
    pins = (line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    return {normal(name): version for name, version in pins}


def pinned(*files: str) -> dict[str, list[str]]:
    """Package -> sha256 of its files, of what these pin for the image."""
    found: dict[str, list[str]] = {}
    for file in files:
        text = (HERE / file).read_text().replace("\\\n", " ")
        for name, rest in re.findall(r"^([\w.-]+)(?:==| @ )(.*)$", text, re.MULTILINE):
            found.setdefault(normal(name), []).extend(re.findall(r"--hash=sha256:([0-9a-f]{64})", rest))
    return found


def licence_of(name: str) -> str:
    """SPDX expression of a package.  Raises Unknown."""
    said, read = _said(name), RULES["read"].get(name)
    if said and read:
        raise Unknown(f"{name}: its metadata say {said} by now: take it out of [read] in licences.toml")
    if not said and not read:
        raise Unknown(
            f"{name} is not installed, or its metadata do not say which licence it has: `make licences` in an environment"
            " of the lock, or read its licence and name it below [read] in infra/requirements/licences.toml"
        )
    return said or read


def _said(name: str) -> str | None:
    """What the metadata say; None where nothing that is understood, or it is not installed."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return None
    classified = (each for each in found.get_all("Classifier", []) if each.startswith("License ::"))
    for words in (
        found.get("License-Expression"),
        found.get("License"),
        *(each.split(" :: ")[-1] for each in classified),
    ):
        words = (words or "").strip().partition("\n")[0]  # a whole licence begins with its name
        if words in RULES["said"]:
            return RULES["said"][words]
        try:
            return str(canonicalize_license_expression(words))
        except InvalidLicenseExpression:
            pass
    return None


def allowed(name: str) -> set[str]:
    return {*RULES["permissive"], *(rule["licence"] for rule in RULES["only"] if name in rule["packages"])}


def licences_in(expression: str) -> set[str]:
    return set(re.findall(r"[\w.+-]+", expression)) - _OPERATORS


def wrong() -> list[str]:
    """What is not as it should be, of all that is locked."""
    found, told = {}, []
    for name in locked():
        try:
            found[name] = licence_of(name)
        except Unknown as error:
            told.append(str(error))
            continue
        for licence in sorted(licences_in(found[name]) - allowed(name)):
            told.append(f"{name}: {licence} is not allowed: do without it, or say in licences.toml why it may be")
    for rule in RULES["only"]:
        idle = [name for name in rule["packages"] if rule["licence"] not in licences_in(found.get(name, ""))]
        told += [
            f"{name}: it is allowed {rule['licence']}, and has it not: take it out of licences.toml" for name in idle
        ]
    told += [
        f"{name}: it is not locked: take it out of [read] in licences.toml"
        for name in RULES["read"].keys() - found.keys()
    ]
    return told


def notice() -> str:
    """infra/NOTICE: what is in the image, under which licences."""
    image = sorted(pinned("common.txt", "cpu.txt"))
    gpu = sorted(pinned("cuda.txt").keys() - set(image))
    lines = [
        "diffusion-pipeline is under Apache-2.0 (LICENSE).  Its image has these packages, each under its own licence,",
        "whose text lies beside it, where it brings one: /opt/venv/lib/python3.11/site-packages/NAME-VERSION.dist-info.",
        "Some carry libraries of others (numpy, opencv-python-headless, pillow, psycopg-binary, ray, scikit-learn, scipy,",
        "torch): their texts lie there, too.  Versions: requirements.lock.  Made by `make licences`; SPDX expressions.",
        "",
        *(f"{name:<36} {licence_of(name)}" for name in image),
        "",
        *(
            f"{rule['licence']} ({', '.join(name for name in rule['packages'] if name in image)}): {rule['why']}."
            for rule in RULES["only"]
            if set(rule["packages"]) & set(image)
        ),
        "",
        "The image for GPUs has these as well, most of them from NVIDIA under its own terms, which are not open.  They",
        "are not installed where this list is made: read their terms before you pass that image on.",
        "",
        *gpu,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    told = wrong()
    if not told and "--write" in sys.argv[1:]:
        NOTICE.write_text(notice())
        print(NOTICE.relative_to(ROOT))
    print(*told, sep="\n", end="\n" if told else "")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
