"""Where a site's settings come from: an option, a variable, the file `site.toml`, a default; the first that says something.

The file is `site.toml` in the home, or the one that DIFFUSION_SITE names.  Not one in the current folder: a worker or a
timer starts wherever it does, and what runs would depend on it.

pydantic-settings reads such places too.  As a base class of `Site` it would read them again wherever Prefect makes a site of
a flow's parameters, and a worker's own variables would fill in what the sender had left at its default.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from diffusion.store.scrub import HIDDEN, is_secret, without_passwords

PREFIX = "DIFFUSION_"
VARIABLE = f"{PREFIX}SITE"
FILE = "site.toml"
TABLE = "environment"
OPTION, DEFAULT = "option", "default"

_LIBRARIES = ("AWS_", "MLFLOW_", "OTEL_", "PREFECT_", "RAY_", PREFIX)
_BY_NAME = ("PGPASSFILE", "PGPASSWORD", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_USUAL = (  # of the libraries' variables those that a site needs: a name that is nearly one of them is a mistake
    "AWS_ACCESS_KEY_ID",
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    *_BY_NAME,
)
_SETTING_OF = {"PREFECT_API_URL": "prefect", "MLFLOW_TRACKING_URI": "mlflow", "RAY_ADDRESS": "ray"}
_PLACES = ("home", "data", "runs", "bundles")


class SiteFile(NamedTuple):
    """What a site's file says.  environment: variables of the libraries, which count where they are not set."""

    path: Path | None = None
    settings: dict[str, object] = {}
    environment: dict[str, str] = {}


class Setting(NamedTuple):
    """A value as it was written, and where: "option", a variable's name, a file's path."""

    value: object
    source: str


def site_file(fields: Collection[str], environment: Mapping[str, str], home: Path) -> SiteFile:
    """The file of the site, or an empty one where there is none.  Raises ValueError, naming every key that is wrong."""
    named = environment.get(VARIABLE)
    path = Path(named or home / FILE).expanduser().absolute()
    if not named and not path.is_file():
        return SiteFile()
    try:
        said = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): correct {VARIABLE}, or write the file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}. See docs/sites.md for whole examples") from None
    variables = said.pop(TABLE, {})
    if not isinstance(variables, dict):
        raise ValueError(f"{path}: {TABLE} is a table of variables: write [{TABLE}], and AWS_PROFILE = ... below it")
    wrong = [*_wrong_keys(said, fields), *_wrong_variables(variables, fields)]
    if "home" in said and not named:
        wrong.append(f"home: leave it out, for the file lies in the home; one elsewhere is named by {VARIABLE}")
    if wrong:
        raise ValueError("\n".join(f"{path}: {words}" for words in wrong))
    for place in _PLACES:
        if isinstance(said.get(place), str):
            said[place] = _beside(path.parent, said[place])
    return SiteFile(path, said, {name: _text(value) for name, value in variables.items()})


def settings(
    fields: Collection[str], environment: Mapping[str, str], given: Mapping[str, object], default_home: Path
) -> tuple[dict[str, Setting], SiteFile]:
    """What is set of the fields, and the site's file.  given: options, of which those that are None say nothing.

    Raises ValueError for a DIFFUSION_* variable that is nearly a field's, and what `site_file` does.
    """
    set_: dict[str, Setting] = {}
    for name in sorted(key for key in environment if key.startswith(PREFIX) and key != VARIABLE):
        field = name.removeprefix(PREFIX).lower()
        if field in fields:
            set_[field] = Setting(environment[name], name)
        elif close := difflib.get_close_matches(field, fields, n=1):
            raise ValueError(f"{name} is no setting of a site; did you mean {PREFIX}{close[0].upper()}?")
    set_ |= {field: Setting(value, OPTION) for field, value in given.items() if value is not None}
    home = set_["home"].value if "home" in set_ else default_home
    file = site_file(fields, environment, Path(home).expanduser())
    return {field: Setting(value, str(file.path)) for field, value in file.settings.items()} | set_, file


def in_force(
    fields: Collection[str], environment: Mapping[str, str], given: Mapping[str, object], default_home: Path
) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """What is set of the fields, and the libraries' variables that are set, each with its source.  environment: may have the
    file's variables in it already.  Raises ValueError as `settings` does."""
    found, file = settings(fields, environment, given, default_home)
    variables = {name: Setting(value, str(file.path)) for name, value in file.environment.items()}
    for name in sorted(environment):
        ours = name.startswith(PREFIX) and (name == VARIABLE or name.removeprefix(PREFIX).lower() in fields)
        if not ours and (name.startswith(_LIBRARIES) or name in _BY_NAME):
            said = variables.get(name)
            if said is None or said.value != environment[name]:
                variables[name] = Setting(environment[name], "variable")
    return found, variables


def hidden(name: str, value: object) -> str:
    """A value for people: without the secret that it is, and without the passwords in an address."""
    text = str(value)
    if is_secret(name):
        return HIDDEN if text else ""
    return without_passwords(text)


def _wrong_keys(said: Mapping[str, object], fields: Collection[str]) -> Iterator[str]:
    for key in said:
        if key in fields:
            continue
        field = key.lower().removeprefix(PREFIX.lower())
        if field in fields:
            yield f"{key}: in the file it is called {field}"
        elif key.upper().startswith(_LIBRARIES) or key in _BY_NAME:
            yield f"{key}: it is a variable, and belongs below a line [{TABLE}] at the end"
        else:
            close = difflib.get_close_matches(field, fields, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else f". There are {', '.join(fields)}"
            yield f"there is no setting {key}{hint}"


def _wrong_variables(variables: Mapping[str, object], fields: Collection[str]) -> Iterator[str]:
    for name, value in variables.items():
        field = _SETTING_OF.get(name) or name.removeprefix(PREFIX).lower()
        close = difflib.get_close_matches(name, _USUAL, n=1, cutoff=0.9)
        if name == VARIABLE:
            yield f"{name}: a site's file names no other"
        elif field in fields and (name in _SETTING_OF or name.startswith(PREFIX)):
            yield f"[{TABLE}] {name}: write {field} = ... above the table"
        elif close and name not in _USUAL:
            yield f"[{TABLE}] {name} is no variable; did you mean {close[0]}?"
        elif not name.startswith(_LIBRARIES) and name not in _BY_NAME:
            yield (
                f"[{TABLE}] {name}: only variables of the libraries are set here: {', '.join(_LIBRARIES)} and"
                f" {', '.join(_BY_NAME)}"
            )
        elif not isinstance(value, str | int | float):
            yield f'[{TABLE}] {name}: write a text, as "..."'


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _beside(folder: Path, place: str) -> str:
    """A place; a folder that is relative lies beside the file."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", place):
        return place
    return os.path.normpath(folder / Path(place).expanduser())
