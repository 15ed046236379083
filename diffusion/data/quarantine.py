"""Files set aside: what could not be used and why, with the originals, so that people can look and decide."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from diffusion.data.images import BadPicture
from diffusion.data.manifest import DUPLICATE
from diffusion.recipe import Frozen, canonical_json

REASONS = "reasons.jsonl"
MAX_ORIGINALS_BYTES = 2**28  # originals are kept up to this sum, in order of name; all are listed


class SetAside(Frozen):
    """One file that is in no shard.  `kind` is a few words to count by, `detail` is for people."""

    name: str
    kind: str
    detail: str


class TooManyRejected(ValueError):
    """A larger share of the files than the recipe allows could not be used."""


def count_by_kind(files: Iterable[SetAside]) -> dict[str, int]:
    """Kind of reason -> number of files, sorted by kind."""
    return dict(sorted(Counter(file.kind for file in files).items()))


def write_quarantine(folder: Path, files: Sequence[SetAside], read: Callable[[str], bytes]) -> None:
    """Write `folder`/reasons.jsonl, a line per file, and the originals in `folder`/originals, numbered by line.

    Of duplicates no original is kept: their picture is in the shards.
    """
    (folder / "originals").mkdir(parents=True, exist_ok=True)
    lines, kept = [], 0
    for file in sorted(files, key=lambda file: file.name):
        original = None
        if file.kind != DUPLICATE:
            try:
                data = read(file.name)
            except BadPicture:  # it could not be read in the first place
                data = None
            if data is not None and kept + len(data) <= MAX_ORIGINALS_BYTES:
                original = f"originals/{len(lines):06d}-{PurePosixPath(file.name).name[-48:]}"
                (folder / original).write_bytes(data)
                kept += len(data)
        lines.append(canonical_json({**file.model_dump(), "original": original}))
    (folder / REASONS).write_bytes(b"".join(line + b"\n" for line in lines))


def check_budget(files: Sequence[SetAside], total: int, max_rejected: float, where: Path) -> None:
    """Raises TooManyRejected where more than `max_rejected` of `total` files are damaged (duplicates are not), naming
    counts, reasons, examples, the quarantine's folder and what to type next.
    """
    bad = sorted((file for file in files if file.kind != DUPLICATE), key=lambda file: file.name)
    if len(bad) <= max_rejected * total:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in count_by_kind(bad).items())
    examples = "".join(f"\n  {file.name}: {file.kind} ({file.detail})" for file in bad[:5])
    enough = min(0.99, -(-len(bad) * 100 // total) / 100)
    raise TooManyRejected(
        f"{len(bad)} of {total} files cannot be used ({kinds}); shard.max_rejected allows {max_rejected:.1%}.{examples}\n"
        f"All of them, with reasons: {where}. Repair or remove them in the source; or go on without them:"
        f" `diffusion shard --set shard.max_rejected={enough}`"
    )
