"""What is known of the packages that are locked: licences, the bill of materials, and who asks what is wrong with them."""

import json
import lzma
from pathlib import Path

import jsonschema
import pytest
from referencing import Registry, Resource

from infra.requirements import audit, bom, licences
from tests.ports import free_port

ROOT = Path(__file__).parents[1]
SCHEMAS = json.loads(lzma.decompress((ROOT / "tests" / "schemas" / "cyclonedx.json.xz").read_bytes()))
MADE = bom.bom()


def package(folder: Path, name: str, *lines: str) -> None:
    """One that is installed, as far as its metadata say."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1", *lines, ""]))


# --- licences


def test_every_locked_package_has_a_licence_it_may_have() -> None:
    assert licences.wrong() == []


def test_the_notice_of_the_image_is_that_of_the_lock() -> None:
    assert licences.NOTICE.read_text() == licences.notice(), "type `make licences`"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["License-Expression: AGPL-3.0-only"], "thing: AGPL-3.0-only is not allowed"),
        (["License-Expression: MIT OR GPL-3.0-or-later"], "thing: GPL-3.0-or-later is not allowed"),
        (["License-Expression: MPL-2.0"], "thing: MPL-2.0 is not allowed"),  # to others
        (["License: BSD"], "do not say which licence"),
        (["License: Copyright (c) somebody", "Classifier: License :: OSI Approved"], "do not say which licence"),
        (["License: MIT"], None),
        (["License: Copyright (c) somebody", "Classifier: License :: OSI Approved :: MIT License"], None),
        (["License-Expression: Apache-2.0 WITH LLVM-exception AND (0BSD OR ISC)"], None),
    ],
)
def test_what_a_new_package_says_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], says: str | None
) -> None:
    package(tmp_path, "thing", *lines)
    monkeypatch.syspath_prepend(tmp_path)
    there = licences.locked()
    monkeypatch.setattr(licences, "locked", lambda: {**there, "thing": "1"})
    told = licences.wrong()
    assert [says in each for each in told] == ([True] if says else [])


def test_a_rule_that_nothing_needs_any_more_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "huey", "License-Expression: MIT")
    monkeypatch.syspath_prepend(tmp_path)
    there = {name: version for name, version in licences.locked().items() if name not in ("psycopg", "cronsim")}
    monkeypatch.setattr(licences, "locked", lambda: there)
    told = "\n".join(licences.wrong())
    assert "huey: its metadata say MIT by now" in told
    assert "psycopg: it is allowed LGPL-3.0-only, and has it not" in told
    assert "cronsim: it is not locked" in told


# --- the bill of materials


def check(document: dict) -> None:
    """Raises jsonschema.ValidationError."""
    registry = Registry().with_resources((uri, Resource.from_contents(each)) for uri, each in SCHEMAS.items())
    jsonschema.Draft7Validator(SCHEMAS[document["$schema"]], registry=registry).validate(document)


def test_it_satisfies_the_published_schema_of_cyclonedx() -> None:
    check(MADE)
    wrong = [{"license": {"id": "BSD"}}]
    with pytest.raises(jsonschema.ValidationError):
        check(MADE | {"components": [MADE["components"][0] | {"licenses": wrong}]})
    with pytest.raises(jsonschema.ValidationError):
        check(MADE | {"componentz": []})


def test_it_has_what_is_locked_and_who_needs_it() -> None:
    locked = licences.locked()
    assert {each["name"]: each["version"] for each in MADE["components"]} == locked
    refs = {each["bom-ref"]: each["name"] for each in MADE["components"]}
    needs = {refs.get(each["ref"], ""): {refs[ref] for ref in each["dependsOn"]} for each in MADE["dependencies"]}
    assert {"torch", "ray", "prefect", "mlflow", "pytest"} <= needs[""]
    assert {"starlette", "pydantic"} <= needs["fastapi"]
    assert "gunicorn" in needs["mlflow"]
    reached, todo = {""}, [""]
    while todo:
        found = needs[todo.pop()] - reached
        reached |= found
        todo += found
    assert locked.keys() - reached == set(), "locked, and pyproject.toml does not come to it: `make lock`"


def test_it_tells_the_image_from_the_rest() -> None:
    scopes = {each["name"]: each["scope"] for each in MADE["components"]}
    assert {scopes[name] for name in ("ray", "torch", "mlflow", "psycopg")} == {"required"}
    assert {scopes[name] for name in ("pytest", "playwright", "ruff")} == {"optional"}
    for each in MADE["components"]:
        assert bool(each["properties"]) == (each["scope"] == "required"), each["name"]


def test_equal_locks_give_equal_bytes() -> None:
    assert json.dumps(bom.bom()) == json.dumps(MADE)


# --- the audit


def test_where_nobody_can_be_asked_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "PLACE", tmp_path / "audit")
    assert audit.audit(ROOT / "requirements.lock", f"http://127.0.0.1:{free_port()}/v1/query") == 3
    assert "does not answer (" in (said := capsys.readouterr().out)
    assert "nothing was looked up" in said
    assert not (tmp_path / "audit").exists()


def test_the_auditor_is_pinned_with_hashes() -> None:
    pins = licences.pinned("audit.txt")
    assert "pip-audit" in pins
    assert min(map(len, pins.values())) >= 1
