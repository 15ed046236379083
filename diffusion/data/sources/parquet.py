"""Parquet tables, through pyarrow: which column holds pictures, and the rows of the others as JSON values."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from diffusion.data.sources.items import BadSource, suffix
from diffusion.data.sources.rows import check_columns, text_rows
from diffusion.store.storage import StorageUnavailable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_MAX_GROUP_BYTES = 2**31  # of pictures, which a worker holds at once
_BATCH = 1024


@contextmanager
def reading(name: str, file: BinaryIO) -> Iterator["pq.ParquetFile"]:
    """An opened table; whatever pyarrow raises in the block becomes BadSource, and two columns of one name are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        check_columns(name, table.schema_arrow.names)
        yield table
    except UnicodeDecodeError as error:
        raise BadSource(
            f"{name} holds the text {error.object[:40]!r}, which is not UTF-8 ({error.reason}): write the table again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageUnavailable | BadSource):
            raise
        raise BadSource(f"{name} cannot be read as Parquet ({error}): copy it again") from error


def held(table: "pq.ParquetFile", column: str) -> tuple[str, str | None] | None:
    """(column, field) of pictures' bytes; None where the column holds no bytes."""
    import pyarrow.types as t

    kind = table.schema_arrow.field(column).type
    if t.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return column, "bytes"
    return (column, None) if t.is_binary(kind) or t.is_large_binary(kind) else None


def check_groups(name: str, table: "pq.ParquetFile", column: str) -> None:
    """Raises BadSource where a row group has more bytes of pictures than a worker should hold."""
    for group in range(table.num_row_groups):
        chunks = [table.metadata.row_group(group).column(i) for i in range(table.metadata.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
        if size > _MAX_GROUP_BYTES:
            raise BadSource(
                f"{name} holds {size:,} bytes of pictures in one row group, and a worker reads one at a time: write it with"
                " smaller ones, as in `to_parquet(..., row_group_size=1000)`"
            )


def rows(table: "pq.ParquetFile") -> Iterator[tuple[int, int, dict]]:
    """(row group, row in it, values) of each row; of the columns that JSON can hold: texts, numbers, lists and structs of
    them.  A number that is not finite is null, as pandas means it.
    """
    names = [field.name for field in table.schema_arrow if _plain(field.type)]
    for group in range(table.num_row_groups):
        row = 0
        for batch in table.iter_batches(_BATCH, row_groups=[group], columns=names):
            for values in batch.to_pylist():
                yield group, row, {name: _finite(value) for name, value in values.items()}
                row += 1


def table_rows(name: str, file: BinaryIO) -> Iterator[tuple[str, dict]]:
    """(where, row) of a table of any kind, of which this is one.  Raises BadSource."""
    if suffix(name) != ".parquet":
        yield from text_rows(name, file)
        return
    with reading(name, file) as opened:
        for number, (_, _, row) in enumerate(rows(opened)):
            yield f"{name} row {number}", row


def check_said(name: str, table: "pq.ParquetFile", used: list[str]) -> None:
    """Raises BadSource where a column whose label or captions are used holds what `rows` leaves out."""
    for column in used:
        kind = table.schema_arrow.field(column).type
        if not _plain(kind):
            raise BadSource(
                f"{name}: the column {column!r} is of type {kind}, and labels and captions are texts, numbers or lists of"
                " them: write it as such"
            )


def _plain(kind: "pa.DataType") -> bool:
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
