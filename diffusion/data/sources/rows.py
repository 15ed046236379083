"""Rows of text: metadata.jsonl and metadata.csv beside pictures, and tables as .csv, .tsv and .jsonl, a line at a time."""

import csv
import io
import json
from collections.abc import Callable, Iterator
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
        row = json.loads(text, parse_constant=constant)
        canonical_json([row])  # refuses NaN and half characters, which could not be written again
    except (ValueError, RecursionError) as error:
        raise BadSource(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadSource(f"{where} is not a JSON object")
    return row


def _csv_lines(name: str, text: io.TextIOWrapper, delimiter: str) -> Iterator[tuple[str, dict]]:
    rows = csv.DictReader(text, delimiter=delimiter)
    try:
        for row in rows:
            if None in row:
                raise BadSource(f"{name} line {rows.line_num} has more fields than the header")
            yield f"{name} line {rows.line_num}", row
    except csv.Error as error:
        raise BadSource(f"{name} line {rows.line_num}: {error}") from error
