"""metrics.jsonl: the history of a run, one JSON object a line, each moment of the clock once."""

import json
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends to metrics.jsonl.  A line with `event` tells of a start, a checkpoint, a failure; the others are metrics.

    A run that was killed replays the steps since its last checkpoint and comes to the same numbers, so metrics that do
    not go beyond what is written already are left out.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(path)
        self.images_seen = 0  # of the newest metrics
        self.world: int | None = None  # workers of the newest start
        whole = 0
        if self._path.exists():
            for line in self._path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break  # written while the process was killed
                whole += len(line)
                record = json.loads(line)
                self._follow(record)
            with open(self._path, "r+b") as file:
                file.truncate(whole)

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
