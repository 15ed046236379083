"""Sources for the tests: files of all kinds, and what an opened source says of them."""

import io
import json
import zipfile
from pathlib import Path

from PIL import Image

from diffusion.data.sources import Item, Source, open_source, read_item


def picture(colour: str = "#336699") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def items(source: Source | Path) -> list[Item]:
    return list((source if isinstance(source, Source) else open_source(source)).items())


def read(source: Source, name: str) -> bytes:
    return read_item(source.uri, next(item.place for item in source.items() if item.name == name))


def said(source: Source | Path) -> list[tuple]:
    """What a source says of its items, wherever their bytes are."""
    return [(item.name, item.label, item.captions, item.extra) for item in items(source)]


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
