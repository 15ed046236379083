"""What the gate found: a check for each thing that a model must show, and whether it may become the champion."""

from pydantic import Field

from diffusion.recipe import Frozen


class Check(Frozen):
    """One thing that a model must show.  `words` say for people what was found and what the limit is."""

    name: str
    passed: bool
    words: str
    value: float | None = Field(None, description="What was measured, where it is a number")
    limit: float | None = Field(None, description="What it was held against, where that is one")


class Verdict(Frozen):
    """The checks of one model, and against which version of the registered model it was held."""

    checks: tuple[Check, ...] = Field(min_length=1)
    against: str | None = Field(None, description="Version of the champion; none: there was no champion")
    gate: str | None = Field(None, description="Digest of the gate's recipe")

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def beside(self) -> str:
        """What it was held against, for people."""
        return "there was no champion" if self.against is None else f"against the champion, version {self.against}"

    @property
    def reasons(self) -> tuple[str, ...]:
        """For people: of a refusal each one that holds, of a pass what was found."""
        return tuple(check.words for check in self.checks if self.passed or not check.passed)


def markdown(found: Verdict) -> str:
    """The verdict for people: a table with a row for each check."""
    rows = [
        f"| {check.name} | {'passed' if check.passed else '**refused**'} | {_number(check.value)} |"
        f" {_number(check.limit)} | {check.words} |"
        for check in found.checks
    ]
    head = f"The gate **{'passed' if found.passed else 'refused'}** the model; {found.beside}."
    return "\n".join([head, "", "| check | | value | limit | |", "|---|---|---|---|---|", *rows]) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
