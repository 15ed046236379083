"""README and docs: the commands that they show are understood, what they name is there, the program says what they quote,
and the reference is what the code gives."""

import re
import runpy
import tomllib
from itertools import pairwise
from typing import get_args

import pytest

from diffusion.recipe import Recipe
from flows import recipes
from flows.preflight import Until
from flows.site import PREFIX, Site
from flows.site_file import TABLE
from tests.shown import COMMAND, DOCUMENTS, ROOT, anchors, blocks, called, commands, links, named, sentences

BENCHMARK = re.compile(r"python -m (tests\.benchmarks\.\w+)([^`\n]*)")
SOURCES = [
    path for folder in ("diffusion", "docs", "flows", "infra", "tests") for path in (ROOT / folder).rglob("*.py")
]
THEIRS = {"train_unconditional.py"}  # files of other programs
KEYS = list(dict(recipes.keys()))
REFERENCE = ROOT / "docs" / "reference"
BLOCKS = sorted({shown for path in DOCUMENTS for shown in commands(path)})
NAMED = sorted({shown for path in DOCUMENTS for shown in named(path)})
TROUBLE = ROOT / "docs" / "troubleshooting.md"
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.parametrize("shown", BLOCKS)
def test_a_command_that_is_shown_is_understood(shown):
    command, words = called(shown)
    if words == ["--help"]:
        return
    assert not hasattr(command, "commands"), f"there is no command {shown}"
    given = command.make_context(shown, words).params
    recipes.merged(given.get("preset", "demo"), settings=given.get("settings") or ())
    assert (given.get("until") or "deploy") in get_args(Until)


@pytest.mark.parametrize("shown", NAMED)
def test_a_command_that_is_named_has_its_options(shown):
    command, words = called(shown)
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options | {"--help"}
    assert not words or words == ["--help"] or not hasattr(command, "commands"), f"there is no command {words[0]}"
    for setting in (after for word, after in pairwise(words) if word == "--set"):
        assert setting.partition("=")[0] in [*KEYS, "KEY", "key", "..."], setting


def test_commands_were_found():
    assert len(BLOCKS) > 80
    assert len(NAMED) > 60


@each_document
def test_make_has_what_it_is_asked_for(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = [line for block in blocks(path) for line in block]
    asked = [re.match(r"make ([a-z-]+)", line) for line in [*shown, *re.findall(r"`([^`]+)`", path.read_text())]]
    assert {found[1] for found in asked if found} <= set(targets)


@each_document
def test_benchmarks_that_are_named_are_there_with_their_options(path):
    for module, options in BENCHMARK.findall(path.read_text()):
        file = ROOT / (module.replace(".", "/") + ".py")
        assert file.is_file(), module
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in file.read_text(), f"{module} has no {option}"


@each_document
def test_links_lead_somewhere(path):
    for target in links(path):
        name, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        other = path.parent / name if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_linked():
    """From the README, or from a page that is."""
    seen, new = set(), [ROOT / "README.md"]
    while new:
        path = new.pop()
        seen.add(path)
        others = [(path.parent / target.partition("#")[0]).resolve() for target in links(path)]
        new += [other for other in others if other.suffix == ".md" and other.is_file() and other not in seen]
    assert {path for path in DOCUMENTS if path.is_relative_to(ROOT / "docs")} <= seen


@each_document
def test_files_and_keys_of_recipes_that_are_named_are_there(path):
    found = set(re.findall(r"`([\w/]+\.(?:\w+\.)*\w+)", path.read_text()))
    for file in (name for name in found - THEIRS if name.endswith(".py")):
        assert any(f"/{there.relative_to(ROOT).as_posix()}".endswith(f"/{file}") for there in SOURCES), file
    stages = {key.split(".")[0] for key in KEYS if "." in key}
    for name in (name for name in found if name.split(".")[0] in stages and not name.endswith(".py")):
        assert any(key == name or key.startswith(f"{name}.") for key in KEYS), name


@each_document
def test_files_of_settings_that_are_shown_are_understood(path, tmp_path):
    """Blocks that begin with the name of a TOML file: a recipe, or a site."""
    for block in (block for block in blocks(path) if re.match(r"# \S+\.toml\b", block[0])):
        said = tomllib.loads("\n".join(block))
        if said.keys() <= {*Site.model_fields, TABLE}:
            Site.model_validate({key: value for key, value in said.items() if key != TABLE})
            continue
        (tmp_path / "recipe.toml").write_text("\n".join(block))
        assert isinstance(recipes.merged("demo", file=tmp_path / "recipe.toml"), Recipe)


def test_routes_that_are_asked_are_there():
    known = re.findall(r"^## (?:GET|POST|HEAD) (\S+)$", (REFERENCE / "http.md").read_text(), re.MULTILINE)
    assert len(known) > 5
    for path in DOCUMENTS:
        for asked in re.findall(r":7777(/[\w/.]*)", path.read_text()):
            assert asked in [*known, "/openapi.json", "/v1"], f"{path.name}: {asked}"


def test_the_readme_names_every_setting_of_the_site():
    found = re.findall(rf"`({PREFIX})?_?([A-Z]+(?:_[A-Z]+)*)`", (ROOT / "README.md").read_text())
    assert {name.lower() for _, name in found} >= set(Site.model_fields)


@each_document
def test_a_page_begins_with_its_title(path):
    assert path.read_text().startswith("# ")


def test_what_the_page_on_trouble_quotes_the_program_says():
    quoted = [line for block in blocks(TROUBLE) for line in block if line]
    can_be_said = sentences()
    assert [line for line in quoted if not can_be_said.fullmatch(line)] == []
    assert len(quoted) >= 25


def test_the_reference_is_what_the_code_gives():
    written = runpy.run_path(str(REFERENCE / "write.py"))
    pages = written["pages"]()
    changed = [written["difference"](name, text) for name, text in pages.items()]
    assert not any(changed), "write it again: `make docs`, or `python docs/reference/write.py`\n" + "\n".join(changed)
    assert {path.name for path in REFERENCE.glob("*.md")} == set(pages)


def test_the_reference_leaves_nothing_out():
    def of(page: str, what: str) -> set[str]:
        return set(re.findall(what, (REFERENCE / page).read_text(), re.MULTILINE))

    def inner(command: object, name: str) -> set[str]:
        there = getattr(command, "commands", {})
        return set().union(*(inner(each, f"{name} {word}") for word, each in there.items())) if there else {name}

    assert of("commands.md", r"^## (.+)$") == inner(COMMAND, "diffusion")
    assert of("recipe.md", r"^\| `([\w.]+)` \|") == set(KEYS)
    assert of("site.md", r"^\| `(\w+)` \|") == set(Site.model_fields)


def test_the_tree_in_the_readme_is_that_of_the_code():
    """Of the mathematics every file, of the rest every folder."""
    (tree,) = (block for block in blocks(ROOT / "README.md") if block[0].startswith("diffusion/ "))
    core, flows = (ROOT / name for name in ("diffusion", "flows"))
    files = {path.stem for path in core.glob("*.py")} - {"__init__"}
    folders = {f"{path.parent.name}/" for path in [*core.glob("*/__init__.py"), *flows.glob("*/__init__.py")]}
    assert files | folders <= set(re.findall(r"\w+/?", " ".join(tree)))
