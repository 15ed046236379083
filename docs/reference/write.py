"""Writes the pages beside it from the code: commands, recipe, presets, site and HTTP.  `make docs` runs it.

tests/test_documents.py compares the pages with what this gives, so nobody edits them by hand.
"""

import difflib
import inspect
import re
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffusion.adapters.http.card import card
from diffusion.adapters.http.schema import document
from diffusion.data import images
from diffusion.presets import PRESETS
from diffusion.recipe import Recipe
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.refs import ModelRef
from diffusion.text import TextIdentity
from flows import recipes
from flows.cli import app
from flows.site import Site
from flows.site_file import PREFIX

HERE = Path(__file__).parent
SERVED = ("demo", "emoji-text", "restorer")  # whose fields the page on HTTP shows
_BY = "*Written from the code by `make docs`: what is wrong here is wrong there.*"
_NOBODYS = "0" * 64  # a digest, which no page shows
_RECIPE = """What changes a number, and is hashed.  `diffusion recipe show --describe` prints a whole one; `--set KEY=VALUE`
and `--recipe FILE` of a command change it, [a preset](presets.md) begins it."""
_PRESETS = """`--preset NAME` of a command.  What is not named below is at the default of [the recipe](recipe.md)."""
_SITE = """Where things run, which changes no number: a variable, or a key of `site.toml` ([which wins](../sites.md)).
`diffusion site` says what is in force."""
_HTTP = f"""What an endpoint with keys takes and gives that serves the presets {", ".join(SERVED)}.  Its own classes, sizes
and limits, and how fields depend on each other, are in its `/openapi.json`; [serving](../serving.md) has examples."""


def pages() -> dict[str, str]:
    """File name -> its text."""
    return {
        "commands.md": commands(),
        "recipe.md": recipe(),
        "presets.md": presets(),
        "site.md": site(),
        "http.md": http(),
    }


def commands() -> str:
    """Every command of the program with its arguments and options."""
    told = list(_commands(typer.main.get_command(app), "diffusion"))
    lines = ["# Commands", "", _BY, "", "`--help` after any of them says the same in a terminal.", ""]
    lines += _table(("command", "what it does"), ((f"[`{n}`](#{_anchor(n)})", _first(c.help)) for n, c in told))
    for name, command in told:
        records = [(each, each.get_help_record(typer.Context(command))) for each in command.params]
        arguments = " ".join(record[0].strip("[]") for each, record in records if each.param_type_name == "argument")
        lines += ["", f"## {name}", "", *([f"`{name} {arguments}`", ""] if arguments else []), _prose(command.help), ""]
        lines += _table(("option", "what it says"), ((f"`{record[0]}`", record[1]) for _, record in records))
    return _page(lines)


def recipe() -> str:
    """Every key of a recipe."""
    lines = ["# Recipe", "", _BY, "", _RECIPE, ""]
    keys = dict(recipes.keys())
    for name, model in _sections(Recipe):
        fields = [(key, field) for key, field in model.model_fields.items() if f"{name}{key}" in keys]
        lines += [f"## {name.removesuffix('.') or 'the line'}", "", _prose(inspect.getdoc(model)), ""]
        rows = (
            (f"`{name}{key}`", _code(field.default), recipes.allowed(field), field.description or "")
            for key, field in fields
        )
        lines += [*_table(("key", "default", "may be", "meaning"), rows), ""]
    return _page(lines)


def presets() -> str:
    """Every preset: what it is for, and what it changes."""
    usual = _values(Recipe())
    lines = ["# Presets", "", _BY, "", _PRESETS, ""]
    for name, make in PRESETS.items():
        changed = {key: value for key, value in _values(make()).items() if value != usual[key]}
        lines += [f"## {name}", "", _prose(inspect.getdoc(make)), ""]
        lines += [*_table(("key", "value"), ((f"`{key}`", _code(value)) for key, value in changed.items())), ""]
    return _page(lines)


def site() -> str:
    """Every setting of a site."""
    lines = ["# Site", "", _BY, "", _SITE, ""]
    rows = (
        (f"`{name}`", f"`{PREFIX}{name.upper()}`", _code(field.default), _may_be(field), field.description or "")
        for name, field in Site.model_fields.items()
    )
    return _page([*lines, *_table(("setting", "variable", "default", "may be", "meaning"), rows)])


def http() -> str:
    """Every route of the endpoint, from its OpenAPI document."""
    api = document([_card(name) for name in SERVED], guarded=True)
    lines = ["# HTTP", "", _BY, "", _HTTP, ""]
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            lines += [f"## {method.upper()} {path}", "", operation["summary"] + ".", ""]
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                lines += [f"Takes `{kind}`:", "", *_fields(body["schema"]), ""]
            rows = (
                (status, found["description"], _kinds(found), _headers(found))
                for status, found in operation["responses"].items()
            )
            lines += [*_table(("status", "what it means", "content", "headers"), rows), ""]
    for name, schema in api["components"]["schemas"].items():
        lines += [f"## {name}", "", *([_prose(schema["description"]), ""] if "description" in schema else [])]
        for each in schema.get("oneOf", [schema]):
            lines += [*_fields(each), ""]
    return _page(lines)


def _commands(command: typer.core.TyperCommand, name: str) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    for each in inner or ():
        yield from _commands(inner[each], f"{name} {each}")


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _sections(field.annotation, f"{prefix}{name}.")


def _values(recipe: Recipe) -> dict[str, object]:
    """Key -> value."""
    found = {}
    for key in dict(recipes.keys()):
        value: object = recipe
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = value
    return found


def _may_be(field: FieldInfo) -> str:
    """What a setting of a site may be; what a recipe has none of, is said here."""
    union = get_origin(field.annotation) in (Union, UnionType)
    kinds = get_args(field.annotation) if union else (field.annotation,)
    if Path in kinds:
        return "folder"
    if any(get_origin(kind) is tuple for kind in kinds):
        return "whole number, or LEAST:MOST" + (", or none" if type(None) in kinds else "")
    return recipes.allowed(field)


def _card(preset: str) -> dict:
    """What GET /v1/models says of the model that a preset makes of the embedded pictures."""
    line, train = PRESETS[preset](), PRESETS[preset]().train
    with zipfile.ZipFile(Path(images.__file__).parent / "embedded" / "noto-emoji-64.zip") as packed:
        classes = sorted({name.split("/")[0] for name in packed.namelist() if name.endswith(".png")})
    width, tokens = train.unet.text_width, train.text_tokens
    reader = TextIdentity(name=train.text_encoder, digest=_NOBODYS, width=width, tokens=tokens)
    spec = BundleSpec(
        classes=classes,
        resolution=line.shard.resolution,
        unet=train.unet,
        text=None if train.text_encoder == "none" else reader,
        degradations=train.degradations,
        sigma_data=train.sigma_data,
        precision=train.precision,
        ema=line.evaluate.ema,
        sampling=line.evaluate.sampling,
        parameters=1,
        images_seen=train.images,
        **dict.fromkeys(("run_digest", "dataset_digest", "recipe_digest", "weights_sha256"), _NOBODYS),
    )
    lineage = dict.fromkeys(("digest", "run_digest", "dataset_digest"), _NOBODYS)
    model = ModelRef(uri="", name=preset, version="1", aliases=("champion",), **lineage)
    return card(preset, model, spec, line.serve, since=0)


def _fields(schema: dict) -> list[str]:
    needed = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "needed" if name in needed else _code(field["default"]) if field.get("default") is not None else ""
        rows.append((f"`{name}`", _kind(field), default, field.get("description", "")))
    return _table(("field", "may be", "default", "meaning"), rows)


def _kind(schema: dict) -> str:
    """A JSON schema in words.  null is said by leaving the field out."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"`{value}`" for value in values if value is not None)
    if "anyOf" in schema or "oneOf" in schema:
        kinds = (_kind(each) for each in schema.get("anyOf", schema.get("oneOf")) if each != {"type": "null"})
        return " or ".join(dict.fromkeys(kinds))
    if schema.get("contentMediaType") == "application/octet-stream":
        return "file"
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    names = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    kinds = [names.get(each, each) for each in ([kind] if isinstance(kind, str) else kind) if each != "null"]
    limits = [words.format(schema[key]) for key, words in _LIMITS.items() if key in schema]
    return ", ".join([" or ".join(kinds), *limits])


_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "maxLength": "at most {} characters",
}


def _kinds(answer: dict) -> str:
    return ", ".join(f"`{kind}`" for kind in answer.get("content", {}))


def _headers(answer: dict) -> str:
    """Those of a receipt are many: they are its fields."""
    names = [name for name in answer.get("headers", {}) if not name.startswith("X-Diffusion-")]
    receipt = ["`X-Diffusion-...`, the receipt's fields"] if len(names) < len(answer.get("headers", {})) else []
    return ", ".join([f"`{name}`" for name in names] + receipt)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    cells = [" | ".join(re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row) for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {row} |" for row in cells)] if cells else []


def _code(value: object) -> str:
    return f"`{recipes.written(str(value) if isinstance(value, Path) else value)}`"


def _prose(text: str | None) -> str:
    return textwrap.fill(" ".join((text or "").split()), 120, break_long_words=False, break_on_hyphens=False)


def _first(text: str | None) -> str:
    """The first sentence."""
    return re.match(r".*?\.(?=\s|$)|.*", " ".join((text or "").split()))[0]


def _anchor(title: str) -> str:
    return title.replace(" ", "-")


def _page(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in lines).rstrip() + "\n"


def difference(name: str, text: str) -> str:
    """How the page that is there differs from this text; empty where it does not."""
    there = (HERE / name).read_text() if (HERE / name).is_file() else ""
    return "\n".join(difflib.unified_diff(there.splitlines(), text.splitlines(), name, "the code", lineterm="", n=0))


if __name__ == "__main__":
    for name, text in pages().items():
        if difference(name, text):
            (HERE / name).write_text(text)
            print(f"wrote docs/reference/{name}")
