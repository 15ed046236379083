"""Facts of a dataset for people, counted in the catalogue when it is published: see `datasets.REPORT`."""

import sqlite3
from datetime import UTC, datetime
from pathlib import PurePosixPath

from diffusion.data.manifest import Manifest
from diffusion.store.works import STAGE_VERSIONS

SIDES = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # lower bounds of a histogram's bins, pixels
ASPECTS = (1, 1.1, 1.25, 1.5, 2, 3, 5, 10)  # longer side / shorter side
_EXAMPLES = 5


def report(db: sqlite3.Connection, made: Manifest) -> dict:
    """The version of the stage that made it; counts of files, classes, captions and formats; pictures by the lower bound of
    a range of sizes; examples."""
    formats: dict[str, int] = {}
    for (name,) in db.execute("SELECT name FROM items"):
        suffix = PurePosixPath(name).suffix.lower() or "none"
        formats[suffix] = formats.get(suffix, 0) + 1
    kept = "FROM sample s JOIN items i USING (name) JOIN found f USING (name)"
    captions = "json_array_length(i.captions)"
    some, several = db.execute(f"SELECT sum({captions} > 0), sum({captions} > 1) {kept}").fetchone()
    classes = zip(made.classes, made.train_counts, made.holdout_counts, strict=True)
    return {
        "stage": STAGE_VERSIONS["shard"],
        "published": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "files": made.files,
        "kept": made.images + made.holdout,
        "holdout": made.holdout,
        "set_aside": made.set_aside,
        "classes": {name: [train, holdout] for name, train, holdout in classes},
        "captions": {"pictures_with": some, "several": several},
        "formats": dict(sorted(formats.items())),
        "sides": _histogram(db, "min(f.width, f.height)", kept, SIDES),
        "aspects": _histogram(db, "max(f.width, f.height) * 1.0 / min(f.width, f.height)", kept, ASPECTS),
        "bytes": {
            "source": db.execute("SELECT coalesce(sum(bytes), 0) FROM items JOIN found USING (name)").fetchone()[0],
            "shards": sum(entry.bytes for entry in made.shards),
        },
        "examples": {kind: _examples(db, kind) for kind in made.set_aside},
    }


def _histogram(db: sqlite3.Connection, value: str, rows: str, bounds: tuple[float, ...]) -> dict[str, int]:
    bins = zip(bounds, (*bounds[1:], float("inf")), strict=True)
    sums = ", ".join(f"sum({value} >= {low} AND {value} < {high if high < 1e9 else '9e999'})" for low, high in bins)
    found = db.execute(f"SELECT {sums} {rows}").fetchone()
    return {str(low): count for low, count in zip(bounds, found, strict=True) if count}


def _examples(db: sqlite3.Connection, kind: str) -> list[list[str]]:
    """[name, detail] of the first files by name."""
    rows = db.execute("SELECT name, detail FROM aside WHERE kind = ? ORDER BY name LIMIT ?", (kind, _EXAMPLES))
    return [list(row) for row in rows]
