"""Several files by one pattern, as shells and WebDataset write it: `shards/{00000..00099}.tar`, `{a,b}.tar`, `x/*.tar`."""

import glob
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from diffusion.data.sources.containers import local_mark
from diffusion.data.sources.items import BadSource, File
from diffusion.data.sources.places import place, storage_at
from diffusion.store.storage import LocalFolder, check_name

SPECIAL = re.compile(r"[*?\[{]")
_WILD = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 100_000  # files that braces may stand for


def matching(uri: str) -> list[File]:
    """The files that a pattern means, each named below the pattern's fixed folder.  Raises BadSource where a part of it
    means none: a shard of a numbered set that is missing is no smaller set.
    """
    base = uri[: uri.rfind("/", 0, SPECIAL.search(uri).start())] or "/"
    patterns = list(braces(uri[len(base.rstrip("/")) + 1 :]))
    storage = storage_at(base)
    if isinstance(storage, LocalFolder):
        found = [[_local(base, name) for name in glob.glob(pattern, root_dir=base)] for pattern in patterns]
    else:
        fixed = SPECIAL.split(uri[len(base) + 1 :])[0]
        there = {name: _file(base, name, size, mark) for name, size, mark in storage.walk(fixed)}
        found = [[there[check_name(name)] for name in _chosen(pattern, there)] for pattern in patterns]
    missing = [pattern for pattern, files in zip(patterns, found, strict=True) if not files]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise BadSource(f"source {uri}: no file is there for {len(missing)} of {len(patterns)} names ({some})")
    return sorted({file for files in found for file in files})


def braces(text: str) -> Iterator[str]:
    """{a,b} and {08..11} -> each of them.  Raises BadSource."""
    expanded = [text]
    while any("{" in one for one in expanded):
        expanded = [each for one in expanded for each in _expand_one(one)]
        if len(expanded) > _MOST:
            raise BadSource(f"{text} means more than {_MOST:,} files")
    yield from dict.fromkeys(expanded)


def _expand_one(text: str) -> Iterator[str]:
    found = _BRACES.search(text)
    if "{" not in text:
        yield text
        return
    span = found and _RANGE.fullmatch(found[1])
    if found is None or not (span or "," in found[1]):
        raise BadSource(f"{text}: braces are a range {{000..012}} or a list {{a,b}}")
    if span:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _MOST:
            raise BadSource(f"{text}: {{{found[1]}}} is no range of up to {_MOST:,} numbers")
        values = (f"{number:0{len(span[1])}d}" for number in range(first, last + 1))
    else:
        values = iter(found[1].split(","))
    for value in values:
        yield text[: found.start()] + value + text[found.end() :]


def _chosen(pattern: str, names: dict[str, File]) -> list[str]:
    if not _WILD.search(pattern):
        return [pattern] if pattern in names else []
    parts = pattern.split("/")
    split = ((name, name.split("/")) for name in names)
    return [name for name, of in split if len(of) == len(parts) and all(map(fnmatchcase, of, parts))]


def _local(base: str, name: str) -> File:
    size, mark, _ = local_mark(Path(base, name), Path(base))
    return _file(base, name, size, mark)


def _file(base: str, name: str, size: int, mark: str) -> File:
    return File(name, name, size, mark, place("file", f"{base.rstrip('/')}/{name}"))
