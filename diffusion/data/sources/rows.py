"""Rows of text: metadata.jsonl and metadata.csv beside pictures, and tables as .csv, .tsv and .jsonl, a line at a time."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import BinaryIO

from diffusion.data.sources.items import BadSource, suffix
from diffusion.data.sources.listing import not_utf8
from diffusion.recipe import canonical_json

TEXT_TABLES = (".csv", ".tsv", ".jsonl")
_LONGEST_LINE = 2**24  # characters


def text_rows(name: str, file: BinaryIO) -> Iterator[tuple[str, dict]]:
    """(where, row) of each line of a .csv, .tsv or .jsonl file.  Raises BadSource naming file and line."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    try:
        if suffix(name) == ".jsonl":
            yield from _json_lines(name, text)
        else:
            yield from _csv_lines(name, text, "\t" if suffix(name) == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise not_utf8(name, error) from error


def _json_lines(name: str, text: io.TextIOWrapper) -> Iterator[tuple[str, dict]]:
    number = 0
    while line := text.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise BadSource(
                f"{name} line {number} has {_LONGEST_LINE:,} characters or more: one line is one JSON object"
            )
        if line.strip():
            yield f"{name} line {number}", json_object(line, f"{name} line {number}")


def json_object(text: str, where: str, constant: Callable[[str], object] | None = None) -> dict:
    """One JSON object.  constant: what NaN and Infinity become, where they are allowed.  Raises BadSource."""
    try:
        row = json.loads(text, parse_constant=constant, object_pairs_hook=_once)
        canonical_json([row])  # refuses NaN and half characters, which could not be written again
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadSource(f"{where} is not a JSON object")
    return row


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON whose keys are all different."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return made


def _csv_lines(name: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[str, dict]]:
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    began = 1  # the line of a row's beginning: a quoted field may go over many
    try:
        for row in rows:
            where, began = f"{name} line {began}", rows.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
                check_columns(name, header)
            elif len(row) > len(header):
                raise BadSource(f"{where} has more fields than the header")
            else:
                yield where, dict(zip_longest(header, row))
    except csv.Error as error:
        raise BadSource(
            f"{name}: the row that begins in line {began} cannot be read beyond line {rows.line_num} ({error}). A quote that"
            f" is opened is closed, one inside is written twice, and a field has up to {csv.field_size_limit():,} characters"
        ) from error


def check_columns(name: str, columns: list[str]) -> None:
    """Raises BadSource where a table has two columns of one name, or names that look like others."""
    for column in filter(None, columns):
        if columns.count(column) > 1:
            raise BadSource(f"{name} has the column {column!r} twice: keep one, or give them two names")
        if column != column.strip():
            raise BadSource(
                f"{name} has the column {column!r}, with blanks at an end: remove them, beside the fields below it as well"
            )
