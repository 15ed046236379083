"""What the documents show: blocks of code, the commands in them, titles and links; and what the program can say."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from flows.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "infra" / "README.md",
    ROOT / "diffusion" / "data" / "embedded" / "README.md",
]
COMMAND = typer.main.get_command(app)
_BEFORE = r"(?:\S+=\S+ +)*(?:docker compose .* exec +\S+ +|kubectl .* -- +)?"
_PROGRAM = re.compile(rf"{_BEFORE}(?:\S*/)?diffusion +(\S.*)")
_OPERATORS = {"|", "||", "&&", "&", ";", ">", ">>", "<", "2>", ")"}
_LEAST = 20  # characters of a sentence that are its own, and not what it is about
_HEAD = 60  # characters that may stand before it: a file, a kind of error
_ANYTHING = "\0"


def blocks(path: Path) -> Iterator[list[str]]:
    """The blocks of code of a document, indented or fenced, each as its lines; a line that goes on in the next is one."""
    lines: list[str] = []
    for line, code in _marked(path):
        if code:
            lines.append(line)
        elif lines and line.strip():
            yield _whole(lines)
            lines = []
    if lines:
        yield _whole(lines)


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return "\n".join(line for line, code in _marked(path) if not code)


def _marked(path: Path) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is code: within a fence, or indented by four after an empty line or such a line."""
    fenced, before = False, ""
    for line in path.read_text("utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced, before = not fenced, ""
            continue
        indented = line.startswith("    ") and (not before.strip() or before.startswith("    "))
        yield line, fenced or indented
        before = line


def _whole(lines: list[str]) -> list[str]:
    return re.sub(r"\\\n *", " ", "\n".join(line.strip() for line in lines)).split("\n")


def commands(path: Path) -> Iterator[str]:
    """The commands of `diffusion` in a document's blocks, to the end of each: no comment, no pipe.  `...` stands for what
    is left out."""
    for block in blocks(path):
        for line in block:
            if found := _PROGRAM.fullmatch(line.removeprefix("$ ")):
                words = []
                for word in shlex.split(found[1], comments=True):
                    if word in _OPERATORS:
                        break
                    if word == "...":
                        words = words[:-1] if words and words[-1].startswith("--") else words
                        continue
                    words.append(word)
                yield shlex.join(["diffusion", *words])


def named(path: Path) -> Iterator[str]:
    """The commands of `diffusion` that sentences name, with the options that they are about; `a | b` are two."""
    for said in re.findall(r"`(?:\S+=\S+ )*(?:\S*/)?diffusion ([^`]+)`", prose(path)):
        for command in " ".join(said.split()).split(" | "):
            yield f"diffusion {command}"


def called(shown: str) -> tuple[typer.core.TyperCommand | typer.core.TyperGroup, list[str]]:
    """What a line calls, and the words after it; what `diffusion submit` sends is called as well."""
    command, (_, *words) = COMMAND, shlex.split(shown)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
        if command.name == "submit" and words:
            command = COMMAND
    return command, words


def anchors(path: Path) -> set[str]:
    """What `#...` may be after a link to a document, as GitHub makes them of its titles."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+?) *$", prose(path), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w -]", "", plain.lower()).replace(" ", "-")
        again = next(n for n in range(len(found) + 1) if (f"{anchor}-{n}" if n else anchor) not in found)
        found.add(f"{anchor}-{again}" if again else anchor)
    return found


def links(path: Path) -> list[str]:
    """Where the links and pictures of a document lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def sentences() -> re.Pattern[str]:
    """What the program may say in a line, after a few words on what it is about: a text of its code, of which what stands in
    braces may be anything."""
    found = set()
    for package in ("diffusion", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                for line in _text(node).split("\n"):
                    if len(line.replace(_ANYTHING, "")) >= _LEAST:
                        found.add(".*".join(map(re.escape, line.split(_ANYTHING))))
    return re.compile(rf".{{0,{_HEAD}}}(?:{'|'.join(sorted(found))})")


def _text(node: ast.AST) -> str:
    """Of a text in the code what is said, with `_ANYTHING` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else _ANYTHING for part in node.values)
    said = node.value if isinstance(node, ast.Constant) else None
    return re.sub(r"{[a-z_]+}", _ANYTHING, said) if isinstance(said, str) else ""
