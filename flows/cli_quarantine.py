"""`diffusion data quarantine ...`: the files that a dataset set aside, looked at, tried again, let pass."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_data import Ref, on_dataset, sharded
from flows.console import say, ticked, waiting
from flows.foreground import looking
from flows.options import Debug, Home
from flows.preflight import check_empty
from flows.site import Site

if TYPE_CHECKING:
    from diffusion.data.datasets import Dataset
    from diffusion.data.quarantine import SetAside
    from diffusion.store.refs import DatasetRef

app = typer.Typer(
    help="Files that a dataset set aside: why, and what to do about it.", no_args_is_help=True, rich_markup_mode=None
)

Kind = Annotated[list[str] | None, typer.Option("--kind", help="Only files set aside for this reason. Repeatable.")]


@app.command("list")
def list_(
    ref: Ref,
    kind: Kind = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder to copy the originals to, where they are kept.")
    ] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """What was set aside, with reasons; with --out, the files themselves."""

    def work(dataset: "Dataset", _: Site) -> None:
        from diffusion.data.quarantine import original
        from diffusion.data.report import amount

        if out is not None:
            check_empty(out)
        if kind:
            _check_kinds(kind, {file.kind for file in _entries(dataset)})
        counts, copied = Counter(), 0
        for number, file in enumerate(_entries(dataset)):
            if kind and file.kind not in kind:
                continue
            counts[file.kind] += 1
            size = "" if file.bytes is None else f"  {amount(file.bytes)}"
            say(f"  {file.kind:<18} {file.name}{size}  {file.detail}")
            if out is not None and file.place is not None:
                out.mkdir(parents=True, exist_ok=True)
                with open(out / f"{number:06d}-{_file_name(file.name)}", "xb") as target:
                    target.write(original(dataset.root, file))
                copied += 1
        say(
            "  " + (", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "nothing was set aside")
        )
        if out is not None:
            say(f"  {copied:,} originals are in {out}")

    on_dataset(ref, work, debug, home, run=looking)


@app.command()
def retry(ref: Ref, home: Home = None, debug: Debug = False) -> None:
    """Decode everything in quarantine again, with the decoders of today.  What passes makes a new version."""

    def work(dataset: "Dataset", site: Site) -> None:
        from diffusion.data.ingest import retry as again

        _check_no_mixture(dataset)
        with waiting("decoding again what was set aside"):
            made = again(dataset.root, dataset.digest, site.home / "work")
        _told(dataset, made)

    on_dataset(ref, work, debug, home)


@app.command()
def release(
    ref: Ref,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Files as `quarantine list` names them.")
    ] = None,
    kind: Kind = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Let files pass that the recipe did not want: too small, too elongated, near duplicates.  Makes a new version."""

    def work(dataset: "Dataset", site: Site) -> None:
        from diffusion.data.ingest import release as let_pass

        wanted = _chosen(list(_entries(dataset)), names or [], kind or [])
        with waiting(f"making a version with {len(wanted):,} file{'s' * (len(wanted) != 1)} more"):
            made = let_pass(dataset.root, dataset.digest, wanted, site.home / "work")
        _told(dataset, made)

    on_dataset(ref, work, debug, home)


def _entries(dataset: "Dataset") -> "Iterator[SetAside]":
    from diffusion.data.quarantine import entries

    _check_no_mixture(dataset)
    return entries(dataset.root, dataset.digest)


def _check_no_mixture(dataset: "Dataset") -> None:
    if dataset.manifest.parts:
        parts = ", ".join(part.dataset[:16] for part in dataset.manifest.parts)
        raise ValueError(f"{dataset.digest[:16]} is a mixture, which sets nothing aside by itself: give one of {parts}")


def _chosen(files: "list[SetAside]", names: list[str], kinds: list[str]) -> list[str]:
    """sha256 of the files with these names, and of all of these kinds.  Raises ValueError for what is not there."""
    if not names and not kinds:
        raise ValueError("name the files to release, or all of a kind: `--kind 'too small'`")
    if unknown := [name for name in names if name not in {file.name for file in files}]:
        raise ValueError(f"no file {unknown[0]!r} was set aside: see `diffusion data quarantine list`")
    _check_kinds(kinds, {file.kind for file in files})
    chosen = [file for file in files if file.name in names or file.kind in kinds]
    if lost := next((file for file in chosen if file.sha256 is None), None):
        raise ValueError(f"{lost.name} could not be read when it was set aside ({lost.detail}): shard its source again")
    return [file.sha256 for file in chosen]


def _check_kinds(wanted: list[str], there: set[str]) -> None:
    if unknown := [kind for kind in wanted if kind not in there]:
        raise ValueError(f"nothing was set aside as {unknown[0]!r}; there is {', '.join(sorted(there)) or 'nothing'}")


def _told(dataset: "Dataset", made: "DatasetRef") -> None:
    """What became of a dataset."""
    from diffusion.data.datasets import opened, set_latest
    from diffusion.data.report import write_report

    set_latest(dataset.root, made.digest)
    if made.digest == dataset.digest:
        say("  nothing passes that did not before: the dataset stays as it is")
        return
    more = made.images + made.holdout - dataset.manifest.images - dataset.manifest.holdout
    pictures = f"{more:,} picture{'s' * (more != 1)}"
    ticked(f"dataset   {made.digest[:16]} has {pictures} more than {dataset.digest[:16]}, which stays as it is")
    new = opened(made.uri)
    write_report(new)
    sharded(new)


def _file_name(name: str) -> str:
    """The end of a name as a file name: it came with somebody's data, so nothing in it may lead to another folder."""
    return re.sub(r"[^\w.-]", "_", name.rpartition("/")[2], flags=re.ASCII)[-80:]
