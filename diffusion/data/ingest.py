"""From a source to a published dataset: read and decode every file, decide what goes where, write the shards.

The work is two lists of independent tasks (decode a chunk of files, write a shard); `each` runs a function over such a
list, in this process by default and on Ray in `diffusion.adapters.ray_data`.  Tasks and results are plain JSON values.
What is decided between the two depends on the contents and names of the files only, so neither the number of workers
nor the order of their answers can change a byte:

- One picture, one place: of files with equal pixels at the dataset's resolution the first by name is kept, the others
  are recorded as duplicates.  So a held-out picture is never also a training picture.
- Held out are the pictures whose content hash, read as a number in [0, 1), is below `holdout`: adding pictures moves no
  other picture between the splits.  Two exceptions keep small sets usable: a class keeps at least one training picture,
  and at least one picture is held out where any can be.
- Samples are sorted by key, which begins the content hash: a random order, the same for everyone.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from diffusion.data import images, manifest, quarantine
from diffusion.data.images import BadPicture
from diffusion.data.manifest import DUPLICATE, Manifest, Processing, ShardEntry
from diffusion.data.quarantine import SetAside
from diffusion.data.shards import PackedSample, put_shard, write_shard
from diffusion.data.sources import BadSource, Item, open_source, read_item
from diffusion.recipe import ShardRecipe, digest_of
from diffusion.store.publish import publish, staging
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import Storage, open_storage

Each = Callable[[Callable[[dict], dict], list[dict]], Iterable[dict]]  # results may come in any order
Progress = Callable[[int, int], None]  # files decoded, files in all
_CHUNK = (16, 256)  # files per task: few enough to keep every worker busy, many enough to cost nothing


def shard_dataset(
    source: str | Path,
    recipe: ShardRecipe,
    store_root: str | Path,
    *,
    progress: Progress | None = None,
    each: Each = map,
) -> DatasetRef:
    """Shard `source` into `store_root`/datasets/<digest>/, or find that it is there already.

    Raises BadSource (nothing usable), quarantine.TooManyRejected, ValueError (a damaged dataset under that name).
    """
    opened = open_source(source)
    items = {item.name: item for item in opened.items()}
    root = open_storage(Path(store_root).resolve())
    with staging(Path(root.uri)) as folder:
        work = folder / "work"
        work.mkdir()
        pictures, bad = _decode_all(opened.uri, items, recipe, work, progress, each)
        pictures, duplicates = _first_of_each(pictures, {name: item.label for name, item in items.items()})
        aside = [*bad, *duplicates]
        quarantine.write_quarantine(folder / "quarantine", aside, lambda name: read_item(opened.uri, items[name].place))
        try:
            quarantine.check_budget(bad, len(items), recipe.max_rejected, _kept_quarantine(store_root, aside))
        except quarantine.TooManyRejected:
            _publish_quarantine(folder / "quarantine", _kept_quarantine(store_root, aside))
            raise
        made = _write_all(items, recipe, root, work, pictures, aside, each)
        _publish_quarantine(folder / "quarantine", Path(root.uri, manifest.place_of(made.digest), "quarantine"))
    if root.size(f"{manifest.place_of(made.digest)}/{manifest.FILE}") is None:
        return made.ref(manifest.publish(made, root))
    uri = f"{root.uri}/{manifest.place_of(made.digest)}"
    manifest.verify(uri, digest=made.digest)
    return made.ref(uri)


def decode_chunk(task: dict) -> dict:
    """Decode files and append their PNGs to one blob.  Each file becomes a row: its facts, or why it is set aside."""
    rows = []
    with open(task["blob"], "wb") as blob:
        for name, place in task["items"]:
            try:
                picture = images.load(read_item(task["uri"], place))
                pixels = images.fit(picture, resolution=task["resolution"], background=task["background"])
            except BadPicture as error:
                rows.append({"name": name, "kind": error.kind, "detail": error.detail})
                continue
            png = images.encode_png(pixels)
            rows.append(
                {
                    "name": name,
                    "content": images.content_digest(picture),
                    "pixels": sha256(pixels.tobytes()).hexdigest(),
                    "width": picture.width,
                    "height": picture.height,
                    "png": [task["blob"], blob.tell(), len(png)],
                }
            )
            blob.write(png)
    return {"rows": rows}


def pack_shard(task: dict) -> dict:
    """Write one shard from PNGs in blobs and put it in its place; returns its manifest entry."""
    with tempfile.TemporaryDirectory(dir=task["work"]) as folder:
        entry = write_shard(Path(folder), task["split"], _packed(task["samples"]))
        put_shard(open_storage(task["root"]), Path(folder), entry)
    return {"place": task["place"], "entry": entry.model_dump()}


def _packed(samples: list[dict]) -> Iterator[PackedSample]:
    for sample in samples:
        blob, offset, size = sample["png"]
        with open(blob, "rb") as file:
            file.seek(offset)
            png = file.read(size)
        yield PackedSample(sample["key"], sample["label"], sample["facts"], png)


def _decode_all(
    uri: str, items: dict[str, Item], recipe: ShardRecipe, work: Path, progress: Progress | None, each: Each
) -> tuple[list[dict], list[SetAside]]:
    """Rows of good files and the bad ones, each sorted by name; PNGs are in blobs below `work`."""
    places = [[item.name, item.place] for item in items.values()]
    size = min(max(len(places) // 64, _CHUNK[0]), _CHUNK[1])
    common = {"uri": uri, "resolution": recipe.resolution, "background": recipe.background}
    tasks = [
        {**common, "items": places[start : start + size], "blob": str(work / f"{start:09d}")}
        for start in range(0, len(places), size)
    ]
    rows: list[dict] = []
    for result in each(decode_chunk, tasks):
        rows += result["rows"]
        if progress:
            progress(len(rows), len(places))
    rows.sort(key=lambda row: row["name"])
    return [row for row in rows if "content" in row], [SetAside(**row) for row in rows if "kind" in row]


def _first_of_each(rows: list[dict], labels: dict[str, str]) -> tuple[list[dict], list[SetAside]]:
    """Rows sorted by name -> the first of each picture, and the rest as duplicates.  labels: of every file name."""
    first: dict[str, dict] = {}
    again = []
    for row in rows:
        kept = first.setdefault(row["pixels"], row)
        if kept is not row:
            detail = f"the same picture as {kept['name']}"
            if labels[row["name"]] != labels[kept["name"]]:
                detail += f", which is kept as {labels[kept['name']]}; this one says {labels[row['name']]}"
            again.append(SetAside(name=row["name"], kind=DUPLICATE, detail=detail))
    return list(first.values()), again


def divide(samples: list[dict], holdout: float) -> tuple[list[dict], list[dict]]:
    """Samples with `content` and `label` -> (train, held out), as the module says; each sorted by key."""

    def draw(sample: dict) -> float:  # other digits than those that sort the samples
        return int(sample["content"][48:], 16) / 16**16

    samples = sorted(samples, key=lambda sample: sample["key"])
    by_class = defaultdict(list)
    for sample in samples:
        by_class[sample["label"]].append(sample)
    always_train = {max(members, key=draw)["key"] for members in by_class.values()}
    can_leave = [sample for sample in samples if sample["key"] not in always_train]
    held = {sample["key"] for sample in can_leave if draw(sample) < holdout}
    if holdout > 0 and not held:
        if not can_leave:
            raise BadSource(
                f"{len(samples)} pictures in {len(by_class)} classes: none can be held out, since each class needs one for"
                " training. Add pictures: a model is judged by some that training never saw"
            )
        held = {min(can_leave, key=draw)["key"]}
    return [s for s in samples if s["key"] not in held], [s for s in samples if s["key"] in held]


def _write_all(
    items: dict[str, Item],
    recipe: ShardRecipe,
    root: Storage,
    work: Path,
    rows: list[dict],
    aside: list[SetAside],
    each: Each,
) -> Manifest:
    classes = class_names(items[row["name"]].label for row in rows)
    label_of = {name: label for label, name in enumerate(classes)}
    samples = []
    for row in rows:
        item = items[row["name"]]
        facts = {
            "source": item.name,
            "label": item.label,
            "captions": [list(caption) for caption in item.captions],
            "content_sha256": row["content"],
            "width": row["width"],
            "height": row["height"],
            "metadata": item.extra,
        }
        key = row["content"][:32]
        samples.append(
            {"key": key, "label": label_of[item.label], "content": row["content"], "facts": facts, "png": row["png"]}
        )
    train, held = divide(samples, recipe.holdout)
    tasks = []
    for split, members in (("train", train), ("holdout", held)):
        for start in range(0, len(members), recipe.shard_size):
            part = {"split": split, "samples": members[start : start + recipe.shard_size], "place": len(tasks)}
            tasks.append({**part, "root": root.uri, "work": str(work)})
    entries = {result["place"]: ShardEntry(**result["entry"]) for result in each(pack_shard, tasks)}
    return Manifest(
        resolution=recipe.resolution,
        classes=classes,
        train_counts=_counts(train, len(classes)),
        holdout_counts=_counts(held, len(classes)),
        shards=tuple(entries[place] for place in range(len(tasks))),
        processing=Processing(background=recipe.background),
        recipe_digest=digest_of(recipe),
        files=len(items),
        set_aside=quarantine.count_by_kind(aside),
    )


def _counts(samples: list[dict], classes: int) -> tuple[int, ...]:
    counts = Counter(sample["label"] for sample in samples)
    return tuple(counts[label] for label in range(classes))


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in the order of their indices: alphabetical, or by value where all are whole numbers."""
    names = set(labels)
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _kept_quarantine(store_root: str | Path, aside: list[SetAside]) -> Path:
    return Path(store_root).resolve() / "quarantine" / digest_of([file.model_dump() for file in aside])[:16]


def _publish_quarantine(folder: Path, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        publish(folder, final)
    except FileExistsError:  # the same files were set aside before
        return
