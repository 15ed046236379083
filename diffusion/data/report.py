"""What people want to know of a dataset: a page with counts and reasons, and sheets of its pictures.

The numbers come from the manifest and from `report.json`, which sharding writes beside it; the page and the sheets are put
there too.  None of these files is part of the dataset's identity, and nothing reads them back but people.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion.data import manifest, quarantine
from diffusion.data.datasets import Dataset, opened
from diffusion.data.images import BadPicture, encode_png, load
from diffusion.data.manifest import DUPLICATE, Manifest
from diffusion.data.pictures.buckets import shown
from diffusion.data.preview import preview, sheet
from diffusion.data.quarantine import DamagedQuarantine
from diffusion.store.storage import open_storage

PAGE, PICTURES, ASIDE = "report.md", "pictures.png", "set-aside.png"
_CLASSES = 50  # in the page
_EXAMPLES = 5  # of each reason
_FEW = 8  # classes and such in a line
_SHOWN = 8  # likewise, in the sheet
_BAR = 40  # characters of the longest bar
_LIGHT = "#eeeeee"
_RARE = 32  # training pictures in a bucket, below which it is named
_GENERATIONS = 20  # of a chain of parents


class Original(NamedTuple):
    """A file that was set aside: why, and its bytes, None where there are none."""

    kind: str
    data: bytes | None


def write_report(dataset: Dataset) -> str:
    """Put the page and the sheets beside the manifest, and return the page."""
    root = open_storage(dataset.uri)
    rows = {name: [picture.image for picture in row] for name, row in preview(dataset).items()}
    root.put(PICTURES, encode_png(sheet(rows)))
    aside = aside_rows(_originals(dataset), dataset.manifest.resolution)
    if aside:
        root.put(ASIDE, encode_png(sheet(aside)))
    page = markdown(dataset, aside=bool(aside))
    root.put(PAGE, page.encode())
    return page


def _originals(dataset: Dataset) -> Iterator[Original]:
    """The first few files of each reason; none of duplicates, whose picture is in the shards, and none that are lost."""
    counts: Counter[str] = Counter()
    for digest in [part.dataset for part in dataset.manifest.parts] or [dataset.digest]:
        with suppress(DamagedQuarantine):
            for file in quarantine.entries(dataset.root, digest):
                if file.kind != DUPLICATE and counts[file.kind] < _SHOWN:
                    counts[file.kind] += 1
                    yield Original(file.kind, quarantine.original(dataset.root, file) if file.place else None)


def aside_rows(originals: Iterable[Original], side: int) -> dict[str, list[np.ndarray]]:
    """Kind of reason -> pictures uint8 (side, side, 3) of files set aside for it, a crossed square where there is none."""
    rows: dict[str, list[np.ndarray]] = {}
    for kind, data in originals:
        try:
            picture = _crossed(side) if data is None else _whole(load(data), side)
        except BadPicture:
            picture = _crossed(side)
        rows.setdefault(kind, []).append(picture)
    return dict(sorted(rows.items()))


def _whole(image: Image.Image, side: int) -> np.ndarray:
    """All of a picture within a light square, made smaller where it must be, uint8 (side, side, 3)."""
    square = Image.new("RGBA", (side, side), _LIGHT)
    image = image.convert("RGBA")
    image.thumbnail((side, side))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.array(square.convert("RGB"))


def _crossed(side: int) -> np.ndarray:
    """A light square with a cross, uint8 (side, side, 3)."""
    square = np.array(Image.new("RGB", (side, side), _LIGHT))
    diagonal = np.arange(side)
    for across in (diagonal, diagonal[::-1]):
        square[diagonal, across] = 176
    square[[0, -1], :] = square[:, [0, -1]] = 176
    return square


def overview(dataset: Dataset) -> dict[str, str]:
    """A dataset in some lines: title -> text."""
    made, report = dataset.manifest, dataset.report
    tars = {entry.sha256: entry.bytes for entry in made.shards}
    lines = {
        "dataset": dataset.digest,
        "folder": dataset.uri,
        "pictures": f"{made.images:,} for training, {made.holdout:,} held out, of {made.files:,} files",
        "size": f"{_side(made)}, {made.processing.encoding.upper()}",
        **_buckets(made),
        "shards": f"{len(tars):,} with {amount(sum(tars.values()))}",
        "classes": f"{len(made.classes):,}: {few(_counted(made.classes, made.train_counts, made.holdout_counts))}",
    }
    if made.set_aside:
        lines["set aside"] = few(f"{count:,} {kind}" for kind, count in made.set_aside.items())
    if "captions" in report:
        found = report["captions"]
        lines["captions"] = f"{found['pictures_with']:,} pictures have one, {found['several']:,} of them several"
    if made.parts:
        parts = (f"{part.dataset[:16]} with weight {part.weight:g}" for part in made.parts)
        lines["mixture"] = "of " + few(parts)
    if "published" in report:
        lines["published"] = report["published"]
    chain = list(_ancestors(dataset))
    if made_by := _made_by([dataset, *chain]):
        lines["made by"] = made_by
    if made.parent:
        lines["after"] = " after ".join(_parents([dataset, *chain]))
    return lines


def _side(made: Manifest) -> str:
    square = f"{made.resolution} x {made.resolution}"
    return f"buckets of about {square} pixels" if made.processing.buckets else square


def _buckets(made: Manifest) -> dict[str, str]:
    """Where pictures have several sizes, how many have each, as width x height, and which few."""
    if not made.processing.buckets:
        return {}
    train, held = made.by_size("train"), made.by_size("holdout")
    sizes = [size for size in made.processing.buckets if size in train or size in held]
    counts = (f"{shown(size)} {train.get(size, 0):,} + {held.get(size, 0):,}" for size in sizes)
    lines = {"buckets": ", ".join(counts)}
    if rare := [f"{shown(size)} ({train[size]:,})" for size in train if train[size] < _RARE]:
        lines["few"] = (
            f"{', '.join(rare)}: below {_RARE} for training, and a batch larger than its bucket repeats pictures; a lower"
            " shard.bucket_aspect or a larger shard.bucket_step puts them elsewhere"
        )
    return lines


def _counted(classes: tuple[str, ...], train: tuple[int, ...], holdout: tuple[int, ...]) -> Iterator[str]:
    for name, pictures, held in zip(classes, train, holdout, strict=True):
        yield f"{name} {pictures:,} + {held:,}"


def _ancestors(dataset: Dataset) -> Iterator[Dataset]:
    """The datasets that one goes on from, the nearest first, as far as they are here."""
    for _ in range(_GENERATIONS):
        place = dataset.manifest.parent and manifest.place_of(dataset.manifest.parent)
        if place is None or dataset.root.size(f"{place}/{manifest.FILE}") is None:
            return
        yield (dataset := opened(f"{dataset.root.uri}/{place}"))


def _parents(line: list[Dataset]) -> Iterator[str]:
    """The first digits of the parent of each of a dataset and its ancestors."""
    for number, dataset in enumerate(line, start=1):
        if parent := dataset.manifest.parent:
            yield parent[:16] if number < len(line) or number > _GENERATIONS else f"{parent[:16]}, which is not here"
    if len(line) > _GENERATIONS:
        yield "..."


def _made_by(line: list[Dataset]) -> str:
    """Which versions of the shard stage made a dataset's shards, "" where nothing is known.  line: it and its ancestors.

    What it shares with its parent, that or an ancestor of that made.
    """
    counts: Counter[int | None] = Counter()
    left = {entry.sha256 for entry in line[0].manifest.shards}
    for dataset, parent in zip_longest(line, line[1:]):
        shared = left & {entry.sha256 for entry in parent.manifest.shards} if parent else set()
        whole = parent or dataset.manifest.parent is None  # else what it shares is not known
        counts[dataset.report.get("stage") if whole else None] += len(left) - len(shared)
        left = shared
    known = {version: count for version, count in sorted(counts.items(), key=str) if version is not None and count}
    if not known:
        return ""
    told = [f"version {version} of the shard stage" for version in known]
    if len(+counts) > 1:
        told = [f"{what}, {count:,} shards" for what, count in zip(told, known.values(), strict=True)]
        told += [f"unknown ones, {counts[None]:,} shards"] if counts[None] else []
    return "; ".join(told)


def few(parts: Iterable[str]) -> str:
    """The first ones, in a row, and how many there are more."""
    listed = list(parts)
    more = f", and {len(listed) - _FEW:,} more" if len(listed) > _FEW else ""
    return ", ".join(listed[:_FEW]) + more


def markdown(dataset: Dataset, *, aside: bool) -> str:
    """The page.  aside: whether there is a sheet of what was set aside."""
    made, report = dataset.manifest, dataset.report
    parts = [f"# Dataset {dataset.digest[:16]}", _table(("", ""), overview(dataset).items())]
    rows = sorted(
        zip(made.classes, made.train_counts, made.holdout_counts, strict=True), key=lambda row: (-row[1], row[0])
    )
    parts += [
        "## Classes",
        _table(("class", "training", "held out"), [(n, f"{t:,}", f"{h:,}") for n, t, h in rows[:_CLASSES]]),
    ]
    if len(rows) > _CLASSES:
        parts.append(f"The {_CLASSES} largest of {len(rows):,}.")
    parts.append(f"![Some pictures of each class]({PICTURES})")
    if made.set_aside:
        examples = report.get("examples", {})
        lines = [
            (kind, f"{count:,}", "; ".join(f"{name}: {detail}" for name, detail in examples.get(kind, [])[:_EXAMPLES]))
            for kind, count in sorted(made.set_aside.items(), key=lambda item: (-item[1], item[0]))
        ]
        parts += ["## Set aside", _table(("reason", "files", "such as"), lines)]
        if aside:
            parts.append(f"![Some files of each reason; crossed: not a picture any more]({ASIDE})")
        if not made.parts:
            parts.append(f"All of them, with the originals: `diffusion data quarantine list {dataset.digest[:16]}`")
    if "formats" in report:
        found = sorted(report["formats"].items(), key=lambda item: (-item[1], item[0]))
        parts += ["## Files", _table(("format", "files"), [(name, f"{count:,}") for name, count in found])]
        parts.append(
            f"{amount(report['bytes']['source'])} in the source, {amount(report['bytes']['shards'])} in shards."
        )
    for title, name in (("Shorter side, pixels", "sides"), ("Longer side / shorter side", "aspects")):
        if histogram := report.get(name):
            parts += [f"## {title}", "```\n" + "\n".join(bars(histogram)) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def bars(histogram: Mapping[str, int]) -> list[str]:
    """Lower end of a range -> count, as a line with a bar for each range, in their order."""
    pairs = sorted(histogram.items(), key=lambda pair: float(pair[0]))
    most = max(histogram.values())
    return [f"{low:>8}- {count:>9,} {'█' * -(-_BAR * count // most)}" for low, count in pairs]


def amount(size: int) -> str:
    """Bytes for people: "3.1 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
