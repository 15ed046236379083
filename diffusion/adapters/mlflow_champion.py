"""Who is champion of a registered model: the alias moves from the version that it was judged against, or not at all.

Every move is first written to a journal, tags of the model that are added and never changed, and then made; both in the
seat, where one process is at a time.  So a process that dies between the two leaves a line about a move that was not made,
which the next one writes again.
"""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from diffusion.adapters.mlflow_seat import Seat, seat
from diffusion.recipe import Frozen

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION = "champion"
WITHDRAWN = "withdrawn"  # tag of a version that `roll_back` took the alias from
_JOURNAL = "champion."


class Overtaken(RuntimeError):
    """The champion is another than the one that a model was judged against."""


class Move(Frozen):
    """One move of the alias `champion`, as the journal has it."""

    source: str | None  # version; None: there was no champion
    target: str
    by: Literal["gate", "rollback"]
    at: str  # UTC, ISO 8601


def promote(client: "MlflowClient", name: str, version: str, against: str | None) -> None:
    """Make a version the champion in the place of the version `against` (None: there was none), by which it was judged.

    Raises Overtaken where the champion is another by now, or the version was withdrawn meanwhile: then judge it again.
    """
    with seat(client, name) as held:
        present = _champion(client, name)
        if present == version:
            return
        if present != against:
            raise Overtaken(
                f"version {version} of {name!r} was judged against {_called(against)}, and the champion is"
                f" {_called(present)} by now: run `diffusion register` again"
            )
        if WITHDRAWN in client.get_model_version(name, version).tags:
            raise Overtaken(
                f"version {version} of {name!r} was withdrawn while it was judged: run `diffusion register` again"
            )
        _move(client, name, held, present, version, "gate")


def roll_back(client: "MlflowClient", name: str, to: str | None = None) -> Move:
    """Give the alias back to the champion before this one, or to the version `to`, which must have been champion once.

    What it is taken from is tagged as withdrawn, and the gate does not promote it again; going to a withdrawn version takes
    that tag from it.  Raises ValueError where there is no such version.
    """
    with seat(client, name) as held:
        present, moves = _champion(client, name), journal(client, name)
        if present is None and to is None:
            raise ValueError(
                f"{name!r} has no champion to roll back from: name a version with --to; `diffusion models {name}` lists them"
            )
        target = to or _before(moves, present)
        if target is None:
            raise ValueError(
                f"there was no champion of {name!r} before version {present}: name another version with --to;"
                f" `diffusion models {name}` lists them"
            )
        if target == present:
            raise ValueError(f"version {target} of {name!r} is the champion already")
        _check_served_before(client, name, target, moves)
        _withdraw(client, name, present, target, moves)
        return _move(client, name, held, present, target, "rollback")


def journal(client: "MlflowClient", name: str) -> list[Move]:
    """All moves, oldest first."""
    tags = client.get_registered_model(name).tags
    return [Move.model_validate(json.loads(tags[key])) for key in sorted(tags) if key.startswith(_JOURNAL)]


def _champion(client: "MlflowClient", name: str) -> str | None:
    version = client.get_registered_model(name).aliases.get(CHAMPION)
    return None if version is None else str(version)


def _move(
    client: "MlflowClient", name: str, held: Seat, source: str | None, target: str, by: Literal["gate", "rollback"]
) -> Move:
    made = Move(source=source, target=target, by=by, at=datetime.now(UTC).isoformat(timespec="seconds"))
    held.check()
    key = f"{_JOURNAL}{len(journal(client, name)) + 1:06d}"  # sorted as text they are sorted by age
    client.set_registered_model_tag(name, key, made.model_dump_json())
    held.check()
    client.set_registered_model_alias(name, CHAMPION, target)
    return made


def _before(moves: list[Move], version: str) -> str | None:
    """Whom a version was promoted over, when it last was."""
    return next((move.source for move in reversed(moves) if (move.target, move.by) == (version, "gate")), None)


def _check_served_before(client: "MlflowClient", name: str, version: str, moves: list[Move]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_model_version(name, version).tags
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ValueError(
            f"{name!r} has no version {version!r}; `diffusion models {name}` lists those there are"
        ) from None
    if version not in {move.target for move in moves} and tags.get("verdict") != "passed":
        raise ValueError(
            f"version {version} of {name!r} was never champion, and the gate has not let it pass: `diffusion models {name}`"
            f" says why; to let it pass, register it with that limit set otherwise, as `diffusion register --set gate.KEY=X`"
        )


def _withdraw(client: "MlflowClient", name: str, present: str | None, target: str, moves: list[Move]) -> None:
    """Tag what is left, and take that tag from the target."""
    was = WITHDRAWN in client.get_model_version(name, target).tags
    for version in _left(moves, present, target, back=was):
        client.set_model_version_tag(name, version, WITHDRAWN, f"for version {target}")
    if was:
        client.delete_model_version_tag(name, target, WITHDRAWN)


def _left(moves: list[Move], present: str | None, target: str, *, back: bool) -> list[str]:
    """The champion and those before it that came after the target.  back: the target was withdrawn, and so came after the
    champion where it is not among those before it: then none.  None as well where somebody has taken the alias away by hand.
    """
    if present is None:
        return []
    chain = [present]
    while (earlier := _before(moves, chain[-1])) is not None and earlier != target and earlier not in chain:
        chain.append(earlier)
    if _before(moves, chain[-1]) == target:
        return chain
    return [] if back else [present]


def _called(version: str | None) -> str:
    return "nobody" if version is None else f"version {version}"
