"""Tables that name pictures or hold them: .csv, .tsv and .jsonl with a column of paths, .parquet with paths or with bytes
(Hugging Face's {"bytes", "path"}, img2dataset's `jpg`).  Columns are found by usual names, or named by `Columns`.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from diffusion.data.sources.containers import folder_files, local_mark
from diffusion.data.sources.items import BadSource, Columns, File, Item, check_inside, item_of, suffix
from diffusion.data.sources.layouts import NOT_DOWNLOADED, check_rows
from diffusion.data.sources.listing import Listing
from diffusion.data.sources.places import file_of, located, place
from diffusion.data.sources.rows import TEXT_TABLES, text_rows
from diffusion.store.storage import LocalFolder, open_storage

if TYPE_CHECKING:
    import pyarrow.parquet as pq

TABLES = (*TEXT_TABLES, ".parquet")
_URLS = ("url", "URL", "image_url")
_MAX_GROUP_BYTES = 2**31  # of pictures, which a worker holds at once


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
    return open_storage(columns.root).uri if columns.root else located(uri, file_of(table.place)).storage.uri


def _paths(listing: Listing, table: File, columns: Columns, root: str) -> Iterator[tuple[str, str, dict]]:
    """(path below the root, where, row) of each row of a table that names pictures."""
    for where, row in _rows(listing, table, columns):
        column = columns.image_of(row)
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
        yield PurePosixPath(path).as_posix(), where, row


def _no_pictures(name: str, present: list[str]) -> BadSource:
    if any(url in present for url in _URLS):
        return BadSource(f"{name} has web addresses alone, and nothing is downloaded: do so first, with img2dataset")
    return BadSource(
        f"{name} has no column of pictures under a usual name (image, path, file_name, ...); it has {', '.join(present)}:"
        " name it"
    )


def _files_named(listing: Listing, root: str) -> Iterator[File]:
    """The files below the root that rows name, as far as they are there."""
    storage = open_storage(root)
    if not isinstance(storage, LocalFolder):
        for file in folder_files(storage):
            yield file._replace(place=place("file", f"{root.rstrip('/')}/{file.name}"))
        return
    folder = Path(root)
    for name in listing.row_names():
        try:
            size, mark = local_mark(folder / name, folder)
        except OSError:
            continue  # it is counted with all that are missing
        yield File(name, name, size, mark, place("file", str(folder / name)))


def _rows(listing: Listing, table: File, columns: Columns) -> Iterator[tuple[str, dict]]:
    """(where, row) of a table of either kind."""
    checked = False
    with listing.open(table) as file:
        rows = (
            _parquet_rows(table.inside, file) if suffix(table.inside) == ".parquet" else text_rows(table.inside, file)
        )
        for where, row in rows:
            if not checked and (missing := columns.named() - row.keys()):
                raise _no_columns(table.inside, missing, row)
            checked = suffix(table.inside) != ".jsonl"  # whose rows may differ
            yield where, row


def _no_columns(name: str, missing: set[str], present: dict) -> BadSource:
    return BadSource(f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(sorted(present))}")


def _held(listing: Listing, table: File, columns: Columns) -> tuple[str, str | None] | None:
    """The column of a Parquet table that holds pictures' bytes, and its field; None where it names them."""
    import pyarrow as pa

    with listing.open(table) as file:
        schema = _parquet(table.inside, file).schema_arrow
    column = columns.image_of(schema.names)
    if column is None:
        raise _no_pictures(table.inside, schema.names)
    if column not in schema.names:
        raise _no_columns(table.inside, {column}, dict.fromkeys(schema.names))
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return column, "bytes"
    return (column, None) if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) else None


def _held_items(listing: Listing, table: File, columns: Columns) -> Iterator[Item]:
    column, field = _held(listing, table, columns)
    with listing.open(table) as file:
        parquet = _parquet(table.inside, file)
        if missing := columns.named() - set(parquet.schema_arrow.names):
            raise _no_columns(table.inside, missing, dict.fromkeys(parquet.schema_arrow.names))
        number = 0
        for group in range(parquet.num_row_groups):
            _check_group(table.inside, parquet, group, column)
            for row, said in enumerate(_plain_rows(parquet, group)):
                where = f"{table.inside} row {number}"
                if said.get("status", "success") != "success":
                    listing.left_out[NOT_DOWNLOADED] += 1
                else:
                    at = place("row", file_of(table.place), table.mark, group, row, column, field)
                    one = File(f"{table.name}/{number:09d}", "", 0, f"{table.mark}:{number}", at)
                    yield replace(item_of(one, said, where, columns=columns, folder=False), size=None)
                number += 1


def _check_group(name: str, parquet: "pq.ParquetFile", group: int, column: str) -> None:
    columns = parquet.metadata.row_group(group)
    held = sum(
        columns.column(i).total_uncompressed_size
        for i in range(columns.num_columns)
        if columns.column(i).path_in_schema.split(".")[0] == column
    )
    if held > _MAX_GROUP_BYTES:
        raise BadSource(
            f"{name} holds {held:,} bytes of pictures in one row group, and a worker reads one at a time: write it with"
            " smaller ones, as in `to_parquet(..., row_group_size=1000)`"
        )


def _parquet(name: str, file) -> "pq.ParquetFile":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise BadSource(f"{name} cannot be read as Parquet ({error}): copy it again") from error


def _parquet_rows(name: str, file) -> Iterator[tuple[str, dict]]:
    parquet, number = _parquet(name, file), 0
    for group in range(parquet.num_row_groups):
        for row in _plain_rows(parquet, group):
            yield f"{name} row {number}", row
            number += 1


def _plain_rows(parquet: "pq.ParquetFile", group: int) -> Iterator[dict]:
    """The columns that JSON can hold: texts, numbers, lists and structs of them; missing and not finite is null."""
    names = [field.name for field in parquet.schema_arrow if _plain(field.type)]
    for batch in parquet.iter_batches(1024, row_groups=[group], columns=names):
        for row in batch.to_pylist():
            yield {key: _finite(value) for key, value in row.items()}


def _plain(kind) -> bool:
    import pyarrow.types as t

    if t.is_list(kind) or t.is_large_list(kind) or t.is_dictionary(kind):
        return _plain(kind.value_type)
    if t.is_struct(kind):
        return all(_plain(field.type) for field in kind)
    tests = (t.is_string, t.is_large_string, t.is_string_view, t.is_integer, t.is_floating, t.is_boolean, t.is_null)
    return any(test(kind) for test in tests)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return {key: _finite(part) for key, part in value.items()} if isinstance(value, dict) else value
