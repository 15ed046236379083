"""`diffusion data ...`: published datasets looked at, checked, compared and mixed; set aside files looked after."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from flows.console import progress, say, ticked, waiting, warn
from flows.foreground import guarded, looking
from flows.options import Debug, Home
from flows.preflight import check_folder
from flows.site import Site

if TYPE_CHECKING:
    from diffusion.data.datasets import Dataset
    from diffusion.store.storage import Storage

app = typer.Typer(
    help="Published datasets: what is in them, whether they are whole, how they differ.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_WHAT_REF_IS = "First digits of its digest (4 or more), the word latest, or its folder or s3://... ."
Ref = Annotated[str, typer.Argument(metavar="REF", help=_WHAT_REF_IS)]


def data_root(site: Site) -> "Storage":
    """Where the site's datasets are."""
    from diffusion.store.storage import open_storage

    return open_storage(site.data_root)


def sharded(dataset: "Dataset") -> None:
    """What a new dataset holds, and where its report is."""
    from diffusion.data.report import PAGE, overview

    for title, text in overview(dataset).items():
        say(f"  {title:<10} {text}")
    say(f"  report     {dataset.uri}/{PAGE}")


@app.command("list")
def list_(home: Home = None, debug: Debug = False) -> None:
    """The datasets there are."""

    def work(site: Site) -> None:
        from diffusion.data.datasets import latest, opened, places

        root = data_root(site)
        say(f"  in {root.uri}")
        try:
            newest = latest(root)
        except ValueError as error:
            newest = None
            warn(str(error))
        for uri in places(root):
            try:
                dataset = opened(uri)
                published = dataset.report.get("published", "")
            except ValueError as error:
                warn(str(error))
                continue
            made = dataset.manifest
            size = f"{made.resolution:>4} px {made.images:>11,} pictures {made.holdout:>9,} held out"
            after = (
                f"mixture of {len(made.parts)}" if made.parts else f"after {made.parent[:16]}" if made.parent else ""
            )
            when = f"{published:<20} {'latest' if dataset.digest == newest else '':<6}"
            say(f"  {dataset.digest[:16]} {size} {len(made.classes):>6,} classes  {when}  {after}".rstrip())

    looking(work, debug, home=home)


@app.command()
def info(
    ref: Ref,
    shards: Annotated[
        str | None,
        typer.Option(
            "--shards", metavar="SPLIT", help="Print only where the tars of train or holdout are: for webdataset."
        ),
    ] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """What a dataset holds."""

    def work(dataset: "Dataset", _: Site) -> None:
        from diffusion.data.manifest import Split
        from diffusion.data.report import overview

        if shards is not None:
            if shards not in get_args(Split):
                raise ValueError(f"--shards {shards}: the splits are {' and '.join(get_args(Split))}")
            for entry in dataset.manifest.entries(shards):
                say(f"{dataset.root.uri}/{entry.tar}")
            return
        for title, text in overview(dataset).items():
            say(f"  {title:<10} {text}")

    on_dataset(ref, work, debug, home, run=looking)


@app.command()
def lint(ref: Ref, home: Home = None, debug: Debug = False) -> None:
    """Read every byte of a dataset, and of what it set aside, and compare it with index and manifest.  Exit code 1 where
    anything is wrong."""

    def work(dataset: "Dataset", _: Site) -> None:
        from diffusion.data.lint import lint as look

        with progress("lint", "pictures") as update:
            findings = look(dataset, progress=update)
        for place, key, what in findings:
            warn(f"{place}{f', key {key}' if key else ''}: {what}")
        if findings:
            say(
                f"  {len(findings):,} finding{'s' * (len(findings) != 1)}. What is published never changes, so this is"
                f" damage: remove the files named here and {dataset.uri}/manifest.json, and make them again with `diffusion"
                " shard`"
            )
            raise typer.Exit(1)
        made = dataset.manifest
        ticked(
            f"lint      {made.images + made.holdout:,} pictures in {len(made.shards):,} shards are as they were written"
        )

    on_dataset(ref, work, debug, home, run=looking)


@app.command()
def preview(
    ref: Ref,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Class to show. Repeatable. [the 20 largest]")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=64, help="Pictures of each class.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="PNG to write. [a new one in the home]")] = None,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """A contact sheet of training pictures, evenly spread, and their captions.  Reads only what it shows."""

    def work(dataset: "Dataset", site: Site) -> None:
        from diffusion.data.images import encode_png
        from diffusion.data.preview import preview as choose
        from diffusion.data.preview import sheet

        target = (
            out or site.home / "previews" / f"{dataset.digest[:16]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.png"
        )
        check_folder(target.absolute().parent, "`--out FILE`")
        if target.exists():
            raise ValueError(f"--out {target} exists, and no file is overwritten: give a new name")
        rows = choose(dataset, labels=label or (), n=n)
        for name, pictures in rows.items():
            say(title=name)
            for picture in pictures:
                captions = picture.captions
                several = [f"{text} (weight {weight:g})" for text, weight in captions]
                told = "; ".join(several) if len(captions) > 1 else "".join(text for text, _ in captions)
                told = " ".join(told.split())  # on one line
                say(f"  {picture.key}  {picture.source}  {told}".rstrip())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(encode_png(sheet({name: [picture.image for picture in row] for name, row in rows.items()})))
        say(f"  sheet      {target}")

    on_dataset(ref, work, debug, home)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="A", help=_WHAT_REF_IS)],
    after: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    few: Annotated[int, typer.Option("--few", min=0, help="Pictures named of each kind of change.")] = 5,
    home: Home = None,
    debug: Debug = False,
) -> None:
    """What is different from dataset A to dataset B."""

    def work(site: Site) -> None:
        from diffusion.data.compare import difference
        from diffusion.data.datasets import find
        from diffusion.data.report import amount

        a, b = (find(data_root(site), ref) for ref in (before, after))
        with waiting("comparing"):
            found = difference(a, b, few=few)
        say(f"  from {a.digest[:16]} to {b.digest[:16]}")
        say(f"  shared     {found.shared_shards:,} shards with {amount(found.shared_bytes)}")
        for name, (old, new) in found.facts.items():
            say(f"  {name:<10} {old} -> {new}")
        for title, classes in (("new class", found.added_classes), ("lost class", found.removed_classes)):
            for name in classes:
                say(f"  {title:<10} {name}")
        for kind, examples in found.examples.items():
            count = getattr(found, kind)
            if kind == "moved" and not count:  # a picture keeps its split for ever: no news
                continue
            say(f"  {kind:<10} {count:,} pictures" + (" between training and held out" if kind == "moved" else ""))
            for key, source, what in examples:
                say(f"    {key}  {source}  {what}")

    looking(work, debug, home=home)


@app.command()
def mix(
    parts: Annotated[
        list[str], typer.Argument(metavar="REF=WEIGHT...", help="Two datasets or more, as in 3fa1=3 90bc=1.")
    ],
    home: Home = None,
    debug: Debug = False,
) -> None:
    """Publish a mixture: datasets read as one, each as often as its weight says.  Takes no room."""

    def work(site: Site) -> None:
        from diffusion.data.datasets import find, set_latest
        from diffusion.data.mix import mix as publish
        from diffusion.data.report import write_report

        root, weights = data_root(site), []
        for part in parts:
            ref, _, weight = part.rpartition("=")
            if not ref or not re.fullmatch(r"[0-9.]+(e[0-9]+)?", weight):
                raise ValueError(f"{part}: give a dataset and its weight, as in {(ref or part)}=1")
            weights.append((find(root, ref), float(weight)))
        with waiting("comparing the pictures"):
            mixed = publish(root, weights)
        set_latest(root, mixed.digest)
        write_report(mixed)
        sharded(mixed)

    guarded(work, debug, home=home)


def on_dataset(
    ref: str,
    work: Callable[["Dataset", Site], None],
    debug: bool,
    home: Path | None,
    run: Callable[..., None] | None = None,
) -> None:
    """Run a command on the dataset that `ref` names.  run: `looking` for one that writes nothing in the home."""

    def find_and_work(site: Site) -> None:
        from diffusion.data.datasets import find

        work(find(data_root(site), ref), site)

    (run or guarded)(find_and_work, debug, home=home)
