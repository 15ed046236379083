"""A Dockerfile's instructions, as its reference has them: lines joined, comments left out."""

import re
from pathlib import Path
from typing import NamedTuple


class Step(NamedTuple):
    instruction: str
    words: str


def steps(path: Path) -> dict[str, list[Step]]:
    """Those of each stage, by its name; the ARGs before the first under ""."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, list[Step]] = {"": []}
    stage = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, words = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = words.split()[-1]
            found[stage] = []
        found[stage].append(Step(instruction, words))
    return found
