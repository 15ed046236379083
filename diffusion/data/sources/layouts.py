"""How the files of a folder, archive or prefix are understood.  A layout makes items of a listing's files.

imagefolder   class folders, metadata.jsonl, .csv or .parquet, a .txt beside a picture as its caption  [Hugging Face]
EDM           dataset.json with {"labels": [[name, class], ...]} or null  [EDM, dataset_tool.py]
img2dataset   numbered folders or tars with 00000_stats.json: .jpg, .txt and .json of one name; folders are no classes
WebDataset    tars whose files of one key (the path up to the first dot) are one sample
"""

import json
import posixpath
import re
from collections.abc import Iterator
from itertools import islice

from diffusion.data.sources.items import EXTENSIONS, BadSource, File, Item, check_inside, item_of, suffix
from diffusion.data.sources.listing import Listing
from diffusion.data.sources.parquet import table_rows
from diffusion.data.sources.places import refused
from diffusion.data.sources.rows import json_object

STATS = re.compile(r"(^|/)\d+_stats\.json$")
EXPECTED = (
    "Expected pictures (" + " ".join(EXTENSIONS) + ") in class folders, or beside a metadata.jsonl that names them"
)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_EDM = "dataset.json"
_CAPTIONS = (".txt", ".caption")  # files beside a picture
_TEXTS = ("json", "txt", "caption", "cls")  # endings of a sample that are read
_SAID = tuple(f".{ending}" for ending in _TEXTS)  # by which a tar is known as WebDataset's
NOT_DOWNLOADED = "was not downloaded (img2dataset)"


def items_of(listing: Listing, *, archived: bool, stats: bool = False) -> tuple[str, Iterator[Item]]:
    """The layout's name, and the items that it makes of a listing's files.

    archived: they are of tars; stats: img2dataset's 00000_stats.json lies beside them.  Raises BadSource.
    """
    some = any(listing.suffixes[suffix(name)] for name in _METADATA)
    metadata = [file for file in listing.files() if posixpath.basename(file.name) in _METADATA] if some else []
    edm = _edm_labels(listing)
    if edm and metadata:
        raise BadSource(f"source {listing.uri} has both {_EDM} and {metadata[0].name}: keep one")
    if edm:
        return "EDM", _edm(listing, edm[0])
    if not metadata and (archived or stats) and _has_samples(listing):
        return ("img2dataset" if stats else "WebDataset"), _webdataset(listing, folders=not stats)
    return "imagefolder", _imagefolder(listing, metadata)


def _has_samples(listing: Listing) -> bool:
    """Whether anything but pictures is said of a picture by files of its key."""
    if not any(listing.suffixes[ending] for ending in _SAID):
        return False
    endings = ({suffix(file.name) for file in sample} for sample in listing.samples())
    return any(not found.isdisjoint(_SAID) and not found.isdisjoint(EXTENSIONS) for found in endings)


def _imagefolder(listing: Listing, metadata: list[File]) -> Iterator[Item]:
    for file in metadata:
        listing.add_rows(_metadata_rows(listing, file))
    check_rows(listing, "metadata names", "file_name is relative to the metadata file")
    endings = [ending for ending in _CAPTIONS if listing.suffixes[ending]]

    def described() -> Iterator[tuple[tuple[File, tuple[str, dict]], list[File]]]:
        for file in listing.files():
            said = listing.row(file.name) if metadata else None
            if said or suffix(file.name) in EXTENSIONS:
                stem = posixpath.splitext(file.name)[0]
                beside = filter(None, (listing.file(stem + ending) for ending in endings))
                yield (file, said or (file.name, {})), list(islice(beside, 1))

    for (file, (where, row)), texts in listing.texts(described()):
        yield item_of(file, row, where, caption="".join(texts).strip())


def check_rows(listing: Listing, what: str, hint: str) -> None:
    """Raises BadSource where rows name files that are not there."""
    missing, some = listing.rows_without_files()
    if missing:
        names = ", ".join(some) + (", ..." if missing > len(some) else "")
        raise BadSource(
            f"source {listing.uri}: {what} {missing} files that are not there ({names}): add the files or remove their lines"
            f" ({hint})"
        )


def _metadata_rows(listing: Listing, metadata: File) -> Iterator[tuple[str, str, dict]]:
    with listing.open(metadata) as file:
        for where, row in table_rows(metadata.name, file):
            name = row.pop("file_name", None)
            if not isinstance(name, str) or not name:
                raise BadSource(f'{where}: no file_name; each line names its picture, like {{"file_name": "1.png"}}')
            check_inside(name, f"{where}: file_name")
            yield posixpath.normpath(posixpath.join(posixpath.dirname(metadata.name), name)), where, row


def _edm_labels(listing: Listing) -> tuple[list | None] | None:
    """What dataset.json says of labels, which may be null; None where there is no such file, or it is something else."""
    file = listing.file(_EDM)
    said = json_object(listing.text(file), _EDM) if file else {}
    return (said["labels"],) if isinstance(said.get("labels", 0), list | None) else None


def _edm(listing: Listing, labels: list | None) -> Iterator[Item]:
    """Each label is [file name, class index]; null: one class.  The folders are numbers, not classes."""
    by_name: dict[str, int] = {}
    for entry in labels or ():
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise BadSource(f"{_EDM}: {json.dumps(entry)[:80]} is not [file name, class index]")
        name, label = entry
        if not isinstance(label, int) or isinstance(label, bool):
            raise BadSource(f"{_EDM}: {name} has the label {json.dumps(label)[:80]}: it must be one class index")
        if name in by_name:
            raise BadSource(f"{_EDM}: {name} has a label already: keep one")
        by_name[name] = label
    for file in listing.files():
        if suffix(file.name) in EXTENSIONS:
            label = by_name.pop(file.name, None)
            if labels is not None and label is None:
                raise BadSource(f"{_EDM} has no label for {file.name}: give every picture one, or null for all")
            yield item_of(file, {}, _EDM, label="" if label is None else str(label), folder=False)
    if by_name:
        raise BadSource(f"{_EDM} names {len(by_name)} pictures that are not there (first: {min(by_name)})")


def _webdataset(listing: Listing, *, folders: bool) -> Iterator[Item]:
    def described() -> Iterator[tuple[tuple[list[File], dict[str, File]], list[File]]]:
        for sample in listing.samples():
            by_ending = {_ending(file): file for file in sample}
            yield (sample, by_ending), [by_ending[ending] for ending in _TEXTS if ending in by_ending]

    for (sample, by_ending), found in listing.texts(described()):
        texts = dict(zip([ending for ending in _TEXTS if ending in by_ending], found, strict=True))
        where = by_ending["json"].name if "json" in texts else sample[0].name
        row = json_object(texts["json"], where, _null) if "json" in texts else {}
        picture = _picture(sample, by_ending)
        if picture is None and (not set(by_ending) & {"json", "cls"} or STATS.search(sample[0].name)):
            continue
        if picture is None and row.get("status", "success") != "success":
            listing.left_out[NOT_DOWNLOADED] += 1
            continue
        if picture is None:
            only = " ".join(sorted(by_ending))
            picture = sample[0]._replace(place=refused("no picture", f"the sample has only: {only}"))
        caption = texts.get("txt", texts.get("caption", "")).strip()
        yield item_of(picture, row, where, caption=caption, label=texts.get("cls", "").strip(), folder=folders)


def _null(constant: str) -> None:
    """NaN, which img2dataset writes for what a table did not say."""


def _ending(file: File) -> str:
    return posixpath.basename(file.name).partition(".")[2].lower()


def _picture(sample: list[File], by_ending: dict[str, File]) -> File | None:
    """The one picture of a sample: `.jpg` before `.mask.png`."""
    pictures = [ending for ending in by_ending if f".{ending.rpartition('.')[2]}" in EXTENSIONS]
    chosen = [ending for ending in pictures if "." not in ending] or pictures
    if len(chosen) > 1:
        raise BadSource(
            f"{by_ending[chosen[0]].name}: the sample has {len(chosen)} pictures ({' '.join(sorted(chosen))}): keep one of"
            " them under a plain ending like .png"
        )
    return by_ending[chosen[0]] if chosen else None
