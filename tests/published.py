"""A published dataset, read by Python's own tarfile."""

import gzip
import json
import tarfile
from pathlib import Path
from typing import NamedTuple

from diffusion.data import manifest
from diffusion.data.manifest import Manifest


class Published(NamedTuple):
    """One sample as it lies in a shard."""

    split: str
    shard: str
    key: str
    label: int
    facts: dict
    image: bytes
    caption: str


def samples_of(uri: str) -> list[Published]:
    """All samples in reading order."""
    root, made, found = Path(uri).parent.parent, manifest.load(uri), []
    for entry in made.shards:
        rows: dict[str, dict[str, bytes]] = {}
        with tarfile.open(root / entry.tar) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                rows.setdefault(key, {})[extension] = tar.extractfile(member).read()
        for key, row in rows.items():
            image = row.get("png") or row["jpg"]
            label, facts, caption = int(row["cls"]), json.loads(row["json"]), row["txt"].decode()
            found.append(Published(entry.split, entry.sha256, key, label, facts, image, caption))
    return found


def files_of(uri: str) -> dict[str, dict]:
    """What became of each file of the source, by name."""
    with gzip.open(Path(uri, "files.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return {(row := json.loads(line))["name"]: row for line in lines}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def identity(uri: str) -> tuple[bytes, dict[str, bytes]]:
    """All bytes that the dataset's digest stands for: its manifest, and its shards and their indexes by name."""
    root, made = Path(uri).parent.parent, manifest.load(uri)
    return Path(uri, manifest.FILE).read_bytes(), {
        name: (root / name).read_bytes() for entry in made.shards for name in (entry.tar, entry.index)
    }


def accounts_for(uri: str, names: set[str]) -> Manifest:
    """Assert that each file of the source is in one sample or set aside with a reason, and nothing else is."""
    made, files, samples = manifest.verify(uri), files_of(uri), samples_of(uri)
    assert set(files) == names
    assert made.files == len(names)
    kept = {name for name, row in files.items() if "split" in row}
    assert sorted(sample.facts["source"] for sample in samples) == sorted(kept)
    assert len({sample.key for sample in samples}) == len(samples)
    by_kind: dict[str, int] = {}
    for name in names - kept:
        by_kind[files[name]["kind"]] = by_kind.get(files[name]["kind"], 0) + 1
    assert by_kind == made.set_aside
    for sample in samples:
        row = files[sample.facts["source"]]
        assert (sample.split, sample.shard) == (row["split"], made.shards[row["shard"]].sha256)
        assert made.classes[sample.label] == sample.facts["label"] == row["label"]
        assert sample.facts["content_sha256"].startswith(sample.key)
    for split, counts in (("train", made.train_counts), ("holdout", made.holdout_counts)):
        for label, count in enumerate(counts):
            assert count == sum(sample.split == split and sample.label == label for sample in samples)
    return made
