"""Archives for the tests, by independent writers."""

import io
import tarfile
from pathlib import Path

import webdataset as wds

from tests.made_sources import lines, picture

FILES = {
    "b/2.PNG": picture(),
    "a/1.png": picture("#000000"),
    "a/1.txt": "beside",
    "b/photo.2021.png": picture("#111111"),
    "b/photo.2022.png": picture("#222222"),
    "notes.md": "not looked at",
    ".hidden/3.png": "not looked at",
    "metadata.jsonl": lines({"file_name": "b/2.PNG", "text": ["one", {"text": "two", "weight": 0.5}], "x": 5}),
}


def tarred(path: Path, files: dict[str, bytes | str], mode: str = "w", **how) -> Path:
    with tarfile.open(path, mode, **how) as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def webdataset_tar(path: Path, samples: list[dict]) -> Path:
    with wds.TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return path
