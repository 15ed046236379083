"""Tables that name pictures or hold them: .csv, .tsv and .jsonl with a column of paths, .parquet with paths or with bytes
(Hugging Face's {"bytes", "path"}, img2dataset's `jpg`).  Columns are found by usual names, or named by `Columns`.
"""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from diffusion.data.sources import parquet
from diffusion.data.sources.containers import checked, folder_files, local_mark
from diffusion.data.sources.items import (
    BadSource,
    File,
    Item,
    check_inside,
    image_column,
    item_of,
    named,
    said_columns,
    suffix,
)
from diffusion.data.sources.layouts import NOT_DOWNLOADED, check_rows
from diffusion.data.sources.listing import Listing
from diffusion.data.sources.places import file_of, located, place, storage_at
from diffusion.data.sources.rows import TEXT_TABLES
from diffusion.recipe import Columns
from diffusion.store.storage import LocalFolder

TABLES = (*TEXT_TABLES, ".parquet")
_URLS = ("url", "URL", "image_url")


def table_items(listing: Listing, tables: list[File], columns: Columns) -> Iterator[Item]:
    """The items of one or more tables.  Raises BadSource."""
    holding = [table for table in tables if suffix(table.inside) == ".parquet" and _held(listing, table, columns)]
    if holding and len(holding) < len(tables):
        other = next(table for table in tables if table not in holding)
        raise BadSource(f"{holding[0].inside} holds pictures and {other.inside} names them: give one kind at a time")
    if holding:
        for table in holding:
            yield from _held_items(listing, table, columns)
    else:
        yield from _named_items(listing, tables, columns)


def _named_items(listing: Listing, tables: list[File], columns: Columns) -> Iterator[Item]:
    root = _root(tables[0], listing.uri, columns)
    for table in tables:
        listing.add_rows(_paths(listing, table, columns, root))
    listing.add_files(_files_named(listing, root), listing.uri)
    check_rows(listing, "the table names", f"paths are relative to {root}; another folder is `root` of the columns")
    for file in listing.files():
        if said := listing.row(file.name):
            yield item_of(file, said[1], said[0], columns=columns)


def _root(table: File, uri: str, columns: Columns) -> str:
    return storage_at(columns.root).uri if columns.root else located(uri, file_of(table.place)).storage.uri


def _paths(listing: Listing, table: File, columns: Columns, root: str) -> Iterator[tuple[str, str, dict]]:
    """(path below the root, where, row) of each row of a table that names pictures."""
    for where, row in _rows(listing, table, columns):
        column = image_column(columns, row)
        if column is None:
            raise _no_pictures(table.inside, sorted(row))
        path = row.pop(column)
        if not isinstance(path, str) or not path:
            raise BadSource(f"{where}: {column} is {path!r}; it must be the path of a picture")
        if path.startswith(("http://", "https://")):
            raise BadSource(
                f"{where}: {column} is a web address, and nothing is downloaded: do so first, with img2dataset"
            )
        path = path.removeprefix(root.rstrip("/") + "/")
        check_inside(path, f"{where}: {column} (below {root})")
        yield posixpath.normpath(path), where, row


def _no_pictures(name: str, present: list[str]) -> BadSource:
    if any(url in present for url in _URLS):
        return BadSource(f"{name} has web addresses alone, and nothing is downloaded: do so first, with img2dataset")
    if len(present) == 1 and (separator := next((found for found in ";\t|," if found in present[0]), None)):
        return BadSource(
            f"{name} has one column, {present[0][:80]!r}: is it separated by {separator!r}? Fields are separated by ',' in"
            " .csv and by tabs in .tsv: name it so, or save it anew"
        )
    return BadSource(
        f"{name} has no column of pictures under a usual name (image, path, file_name, ...); it has {', '.join(present)}:"
        " name it, as in `--set shard.columns.image=NAME`"
    )


def _files_named(listing: Listing, root: str) -> Iterator[File]:
    """The files below the root that rows name, as far as they are there."""
    storage = storage_at(root)
    if not isinstance(storage, LocalFolder):
        for file in folder_files(storage):
            yield file._replace(place=place("file", f"{root.rstrip('/')}/{file.name}"))
        return
    folder, real = Path(root), Path(root).resolve()
    leads_out = lru_cache(lambda parent: not parent.resolve().is_relative_to(real))
    for name in listing.row_names():
        if leads_out((folder / name).parent):
            raise BadSource(f"the table names {name}, and a link there leads out of {root}: name the real path")
        try:
            size, mark, where = local_mark(folder / name, real)
        except OSError:
            continue  # it is counted with all that are missing
        yield checked("", name, size, mark, place("file", where))


def _rows(listing: Listing, table: File, columns: Columns) -> Iterator[tuple[str, dict]]:
    """(where, row) of a table of either kind."""
    checked = False
    with listing.open(table) as file:
        for where, row in parquet.table_rows(table.inside, file):
            if not checked and (missing := named(columns) - row.keys()):
                raise _no_columns(table.inside, missing, row)
            checked = suffix(table.inside) != ".jsonl"  # whose rows may differ
            yield where, row


def _no_columns(name: str, missing: set[str], present: Iterable[str]) -> BadSource:
    return BadSource(f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(sorted(present))}")


def _held(listing: Listing, table: File, columns: Columns) -> tuple[str, str | None] | None:
    """The column of a Parquet table that holds pictures' bytes, and its field; None where it names them."""
    with listing.open(table) as file, parquet.reading(table.inside, file) as opened:
        present = opened.schema_arrow.names
        column = image_column(columns, present)
        if column is None:
            raise _no_pictures(table.inside, present)
        if missing := named(columns) - set(present):
            raise _no_columns(table.inside, missing, present)
        parquet.check_said(table.inside, opened, said_columns(columns, present))
        return parquet.held(opened, column)


def _held_items(listing: Listing, table: File, columns: Columns) -> Iterator[Item]:
    column, field = _held(listing, table, columns)
    with listing.open(table) as file, parquet.reading(table.inside, file) as opened:
        parquet.check_groups(table.inside, opened, column)
        for number, (group, row, said) in enumerate(parquet.rows(opened)):
            if said.get("status", "success") != "success":
                listing.left_out[NOT_DOWNLOADED] += 1
                continue
            at = place("row", file_of(table.place), table.mark, group, row, column, field)
            one = File(f"{table.name}/{number:09d}", "", 0, f"{table.mark}:{number}", at)
            item = item_of(one, said, f"{table.inside} row {number}", columns=columns, folder=False)
            yield replace(item, size=None)
