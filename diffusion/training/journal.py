"""metrics.jsonl: the history of a run, one JSON object a line, each moment of the clock once."""

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

# By what checkpoints are judged, the lower the better: what the gate judges models by, here of few samples.  Every model has
# it, a student, too, whose answers are no denoised pictures and have no held-out loss.
SCORE = "quick_frechet"


class Journal:
    """Appends to metrics.jsonl.  A line with `event` tells of a start, a checkpoint, a failure; the others are metrics.

    A run that was killed replays the steps since its last checkpoint and comes to the same numbers, so metrics that do
    not go beyond what is written already are left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self.images_seen = 0  # of the newest metrics
        self.world: int | None = None  # workers of the newest start
        lines = _whole_lines(self._path)
        for line in lines:
            self._follow(json.loads(line))
        if self._path.exists():
            with open(self._path, "r+b") as file:
                file.truncate(sum(map(len, lines)))

    def metrics(self, record: dict[str, float]) -> bool:
        """Write metrics unless they were written before.  Returns whether they were new."""
        if record["images_seen"] <= self.images_seen:
            return False
        self._write(record)
        return True

    def event(self, record: dict[str, Any]) -> None:
        """Write an event, {"event": its name, ...}."""
        self._write(record)

    def _follow(self, record: dict[str, Any]) -> None:
        if "event" not in record:
            self.images_seen = record["images_seen"]
        elif "world" in record:
            self.world = record["world"]

    def _write(self, record: dict[str, Any]) -> None:
        self._follow(record)
        with open(self._path, "a") as file:
            file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")


class Judged(NamedTuple):
    """What validation has told of a run's checkpoints by now."""

    # by what -> images_seen -> SCORE, the newest kind last; none of what has no such number
    scores: Mapping[str, Mapping[int, float]] = MappingProxyType({})
    under_way: int | None = None  # images_seen of the one that is being judged
    told: frozenset[int] = frozenset()  # images_seen of all that were measured

    def best(self, n: int) -> set[int]:
        """The best n of each kind, whose numbers are compared with no others; of equal ones the earlier."""
        return {moment for kind in self.scores for moment in ranked(self.scores[kind])[:n]}

    def among(self, there: Collection[int]) -> "Judged":
        """The same of these moments alone."""
        left = {
            kind: {moment: score for moment, score in scores.items() if moment in there}
            for kind, scores in self.scores.items()
        }
        return self._replace(scores=left)


def ranked(scores: Mapping[int, float]) -> list[int]:
    """The moments, the best first; of equal ones the earlier."""
    return sorted(scores, key=lambda moment: (scores[moment], moment))


def judged_in(path: Path) -> Judged:
    """What metrics.jsonl tells of validation, also while it is written.  Without one nothing is judged."""
    scores: dict[str, dict[int, float]] = {}
    told, under_way = set(), None
    for record in _of_validation(path):
        event, moment = record["event"], record["images_seen"]
        if event == "validating":
            under_way = moment
        elif moment == under_way:
            under_way = None
        if event == "validated":
            told.add(moment)
            if SCORE in record:
                kind = record.get("recipe", "")
                scores[kind] = scores.pop(kind, {}) | {moment: record[SCORE]}
    return Judged(scores, under_way, frozenset(told))


def measurements_in(path: Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl that tell of a checkpoint that was measured."""
    return [record for record in _of_validation(path) if record["event"] == "validated"]


def _of_validation(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in _whole_lines(Path(path)) if b"validat" in line]
    return [record for record in records if record.get("event") in ("validating", "validated", "validation_failed")]


def _whole_lines(path: Path) -> list[bytes]:
    """All but one at the end that is being written, or was when its process was killed."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]
