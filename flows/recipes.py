"""Recipes on the command line: presets, files, `--set key=value`, and how they are printed."""

import difflib
import inspect
import json
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from diffusion.presets import PRESETS
from diffusion.recipe import Recipe, digest_of, mistake

_WRITTEN = ("lesson", "chosen_by")  # fields that a stage writes, and nobody sets


def merged(preset: str, *, file: Path | None = None, settings: Iterable[str] = (), name: str | None = None) -> Recipe:
    """The preset, changed by a TOML file, then by each "key=value".  Raises ValueError naming key and allowed values."""
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}: there are {', '.join(PRESETS)}")
    values = PRESETS[preset]().model_dump()
    given: dict[str, str] = {}
    if file is not None:
        for key, value in _flat(_read(file)):
            _put(values, key, _parse(key, value) if isinstance(value, str) else value)
            given[key] = f"{value} (in {file})"
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write --set key=value, such as --set train.images=1000")
        _put(values, key.strip(), _parse(key.strip(), text.strip()))
        given[key.strip()] = text.strip()
    if name is not None:
        values["name"] = given["name"] = name
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
    # of a list whose one item is wrong pydantic says as well that it is empty
    places = [problem["loc"] for problem in problems]
    wrong = [p for p in problems if not any(place[: len(p["loc"])] == p["loc"] != place for place in places)]
    raise ValueError("\n".join(dict.fromkeys(_explained(problem, given) for problem in wrong)))  # of a list each item


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that can be set, with its field: ("train.unet.channels", ...)."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        elif name not in _WRITTEN:
            yield prefix + name, field


def allowed(field: FieldInfo) -> str:
    """What a field may be, for people: "whole number, 1 to 1000"."""
    kinds = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if get_origin(field.annotation) is Literal:
        return " | ".join(map(str, get_args(field.annotation)))
    if get_origin(field.annotation) is tuple:
        if get_origin(get_args(field.annotation)[0]) is Literal:
            return f"list of {' | '.join(get_args(get_args(field.annotation)[0]))}"
        return f"list of {kinds[get_args(field.annotation)[0]]}s, such as {json.dumps(field.default)}"
    limits = {}
    for rule in field.metadata:
        limits |= {
            k: getattr(rule, k)
            for k in ("ge", "gt", "le", "lt", "multiple_of", "pattern")
            if getattr(rule, k, None) is not None
        }
    low = f"at least {limits['ge']}" if "ge" in limits else f"above {limits['gt']}" if "gt" in limits else ""
    high = f"at most {limits['le']}" if "le" in limits else f"below {limits['lt']}" if "lt" in limits else ""
    words = [next((kinds[kind] for kind in (*get_args(field.annotation), field.annotation) if kind in kinds), "number")]
    if type(None) in get_args(field.annotation):
        words[0] += " or none"
    words += [limit for limit in (low, high) if limit]
    words += [f"multiple of {limits['multiple_of']}"] if "multiple_of" in limits else []
    words += [f"matching {limits['pattern']}"] if "pattern" in limits else []
    return ", ".join(words)


def as_toml(recipe: Recipe, *, describe: bool = False) -> str:
    """The recipe as TOML, which `--recipe FILE` reads back, under a comment with its digest."""
    lines = [f"# digest {digest_of(recipe)}"]
    _tables(recipe, "", lines, describe)
    return "\n".join(lines) + "\n"


def presets() -> str:
    """Each preset's name and docstring."""
    return "\n".join(f"{name}\n{textwrap.indent(inspect.getdoc(make) or '', '    ')}" for name, make in PRESETS.items())


def _tables(model: BaseModel, path: str, lines: list[str], describe: bool) -> None:
    inner = [name for name in type(model).model_fields if isinstance(getattr(model, name), BaseModel)]
    if path and len(inner) < len(type(model).model_fields):
        lines += ["", f"[{path}]"]
    for name, field in type(model).model_fields.items():
        if name in inner or name in _WRITTEN:
            continue
        value = getattr(model, name)
        if describe:
            lines.append("# " + ". ".join(part for part in (field.description, allowed(field)) if part))
        lines.append(f"{name} = {written(value)}")
    for name in inner:
        _tables(getattr(model, name), f"{path}.{name}".lstrip("."), lines, describe)


def written(value: Any) -> str:
    """A value of a recipe as TOML."""
    if value is None:  # TOML has no null
        return '"none"'
    return f"[{', '.join(map(written, value))}]" if isinstance(value, tuple) else json.dumps(value, ensure_ascii=False)


def _read(file: Path) -> dict:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"--recipe {file}: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"--recipe {file} is no TOML: {error}. `diffusion recipe show > {file}` writes one") from None


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse(key: str, text: str) -> Any:
    """Text for text fields; else JSON, with the brackets of a list optional; pydantic has the last word.

    A list that is no JSON is given on item by item, so that the wrong item is named and not the list.
    """
    field = dict(keys()).get(key)
    if field is None or field.annotation is str:
        return text
    many = get_origin(field.annotation) is tuple
    if many and not text.startswith("["):
        text = f"[{text}]"
    if text == "none" and type(None) in get_args(field.annotation):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [item.strip() for item in text.removeprefix("[").removesuffix("]").split(",")] if many else text


def _put(values: dict, key: str, value: Any) -> None:
    known = [name for name, _ in keys()]
    if key not in known:
        section = key.rpartition(".")[0]
        beside = [name for name in known if section and name.rpartition(".")[0] == section] or known
        inside = [name for name in known if name.startswith(key + ".")]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close and not inside else "."
        raise ValueError(f"no key {key!r} in a recipe{hint} Allowed: {', '.join(inside or beside)}")
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})  # one that is not written at its usual values
    values[last] = value


def _explained(problem: dict, given: dict[str, str]) -> str:
    known = dict(keys())
    path = [str(part) for part in problem["loc"]]
    key = next((".".join(path[:n]) for n in range(len(path), 0, -1) if ".".join(path[:n]) in known), None)
    message = mistake(problem)
    if key is None:  # a rule about several keys: its message begins with the first one's name
        return ".".join([*path, message])
    about = known[key].description
    return f"{key}={given.get(key, problem['input'])}: {message}. Allowed: {allowed(known[key])}" + (
        f" ({about})" if about else ""
    )
