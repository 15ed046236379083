"""The bill of materials of requirements.lock as CycloneDX 1.6: packages, versions, licences, and who needs whom.

    python -m infra.requirements.bom > sbom.cdx.json        # as `make sbom` does

Made of the lock and of the installed packages' metadata, without a network; equal ones give equal bytes.  `required` is what
the image has, `optional` what the tests and other extras need beside.  sha256 are those of the files that the image's
requirements pin, for every machine they are for.

CycloneDX's own library for Python would bring six packages into the environment that is described, for what are two lists
here; tests/test_supply.py holds the result against the published schema instead.
"""

import hashlib
import json
import sys
import tomllib
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement

from infra.requirements.licences import ROOT, Unknown, licence_of, licences_in, locked, normal, pinned

EXTRAS = ("text", "traces", "test")  # of pyproject.toml, which `make lock` locks


def purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def graph(wanted: list[str]) -> dict[str, set[str]]:
    """Package -> what it needs, of all that these requirements come to, their extras considered.  "": the wanted."""
    found: dict[str, set[str]] = {"": set()}
    seen: set[tuple[str, str]] = set()
    todo = [("", Requirement(each)) for each in wanted]
    while todo:
        of, requirement = todo.pop()
        name = normal(requirement.name)
        found[of].add(name)
        found.setdefault(name, set())
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(name, each) for each in _needs(name, extra)]
    return found


def _needs(name: str, extra: str) -> Iterator[Requirement]:
    try:
        said = requires(name) or ()
    except PackageNotFoundError:  # `licence_of` says so, where that matters
        return
    for each in map(Requirement, said):
        if each.marker is None or each.marker.evaluate({"extra": extra}):
            yield each


def bom() -> dict:
    """The document."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = graph([*project["dependencies"], *(each for extra in EXTRAS for each in extras[extra])])
    versions, image = locked(), pinned("common.txt", "cpu.txt")
    refs = {name: purl(name, version) for name, version in versions.items()}
    ours = purl(project["name"], project["version"])
    told = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": ours,
                "name": project["name"],
                "version": project["version"],
                "description": project["description"],
                "licenses": _licences(project["license"]),
                "purl": ours,
            }
        },
        "components": [
            {
                "type": "library",
                "bom-ref": refs[name],
                "name": name,
                "version": version,
                "scope": "required" if name in image else "optional",
                "licenses": _licences(licence_of(name)),
                "purl": refs[name],
                "properties": [
                    {"name": "diffusion:image:sha256", "value": sha256} for sha256 in sorted(set(image.get(name, ())))
                ],
            }
            for name, version in sorted(versions.items())
        ],
        "dependencies": [
            {"ref": refs.get(name, ours), "dependsOn": sorted(refs[each] for each in needs & refs.keys())}
            for name, needs in sorted(needed.items())
            if name in refs or not name
        ],
    }
    content = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return told | {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}"}


def _licences(expression: str) -> list[dict]:
    if licences_in(expression) == {expression}:
        return [{"license": {"id": expression, "acknowledgement": "declared"}}]
    return [{"expression": expression, "acknowledgement": "declared"}]


def main() -> None:
    try:
        made = bom()
    except Unknown as error:
        sys.exit(str(error))
    json.dump(made, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
