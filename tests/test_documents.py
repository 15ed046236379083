"""README and docs: the commands that they show are understood, and what they name is there."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import typer

from flows import recipes
from flows.cli import app
from flows.preflight import Until
from flows.site import PREFIX, Site

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "infra" / "README.md"]
BENCHMARK = re.compile(r"python -m (tests\.benchmarks\.\w+)([^`\n]*)")
SOURCES = [path for folder in ("diffusion", "flows", "tests") for path in (ROOT / folder).rglob("*.py")]
THEIRS = {"train_unconditional.py"}  # files of other programs
KEYS = list(dict(recipes.keys()))
COMMAND = typer.main.get_command(app)


def commands_in(pattern: str) -> list[str]:
    """Those of `diffusion` in README and docs; without what stands for another word."""
    texts = [path.read_text().replace("\\\n", " ") for path in DOCUMENTS]
    found = {command.split(" #")[0].strip() for text in texts for command in re.findall(pattern, text, re.MULTILINE)}
    return sorted(command for command in found if "|" not in command and "..." not in command)


BLOCKS = commands_in(r"^    (?:\S+=\S+ )*(diffusion .*)")
NAMED = commands_in(r"`(?:\S+=\S+ )*(diffusion [^`\n]+)`")  # with the options that the sentence is about


def found(shown: str) -> tuple[typer.core.TyperCommand | typer.core.TyperGroup, list[str]]:
    """What a line calls, and the words after it."""
    command, (_, *words) = COMMAND, shlex.split(shown)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command, words


@pytest.mark.parametrize("shown", BLOCKS)
def test_a_command_that_is_shown_is_understood(shown):
    command, words = found(shown)
    given = command.make_context(shown, words).params
    recipes.merged(given.get("preset", "demo"), settings=given.get("settings") or ())
    assert given.get("until", "deploy") in get_args(Until)


@pytest.mark.parametrize("shown", NAMED)
def test_a_command_that_is_named_has_its_options(shown):
    command, words = found(shown)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options
    assert not words or not hasattr(command, "commands"), f"there is no command {words[0]}"


def test_commands_were_found():
    assert len(BLOCKS) > 25
    assert len(NAMED) > 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_benchmarks_that_are_named_are_there_with_their_options(path):
    for module, options in BENCHMARK.findall(path.read_text()):
        file = ROOT / (module.replace(".", "/") + ".py")
        assert file.is_file(), module
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in file.read_text(), f"{module} has no {option}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert target.startswith("http") or other.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_keys_of_recipes_that_are_named_are_there(path):
    named = set(re.findall(r"`([\w/]+\.(?:\w+\.)*\w+)", path.read_text()))
    for file in (name for name in named - THEIRS if name.endswith(".py")):
        assert any(found.as_posix().endswith(f"/{file}") for found in SOURCES), file
    stages = {key.split(".")[0] for key in KEYS if "." in key}
    for name in (name for name in named if name.split(".")[0] in stages and not name.endswith(".py")):
        assert any(key == name or key.startswith(f"{name}.") for key in KEYS), name


def test_the_readme_names_every_setting_of_the_site():
    named = re.findall(rf"`({PREFIX})?_?([A-Z]+(?:_[A-Z]+)*)`", (ROOT / "README.md").read_text())
    assert {name.lower() for _, name in named} >= set(Site.model_fields)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_page_begins_with_its_title(path):
    assert path.read_text().startswith("# ")
