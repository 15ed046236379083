"""Small values that never change: their one byte string, their digest, and what is wrong with one, in words."""

import hashlib
import json
from collections.abc import Callable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Frozen(BaseModel):
    """A small value that never changes; unknown keys and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def first_mistake(error: ValueError) -> str:
    """What is wrong, in a line; of what pydantic found the first, and where."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {mistake(first)}"


_MISTAKES = {  # of pydantic, whose own words are for programmers
    "int_type|int_parsing|int_parsing_size|int_from_float": "it is no whole number",
    "float_type|float_parsing": "it is no number",
    "finite_number": "it is no finite number",
    "bool_type|bool_parsing": "it is neither true nor false",
    "string_type|string_unicode": "it is no text",
    "list_type|tuple_type": "it is no list",
    "dict_type|model_type|model_attributes_type": "it is no object with names and values",
    "greater_than_equal": "it must be at least {ge}",
    "greater_than": "it must be above {gt}",
    "less_than_equal": "it must be at most {le}",
    "less_than": "it must be below {lt}",
    "multiple_of": "it must be a multiple of {multiple_of}",
    "literal_error": "it must be {expected}",
    "string_pattern_mismatch": "it must match {pattern}",
    "string_too_short": "it must have at least {min_length} characters",
    "string_too_long": "it must have at most {max_length} characters",
    "too_short": "it must have at least {min_length} items",
    "too_long": "it must have at most {max_length} items",
    "missing": "it is missing",
    "extra_forbidden": "it is not known",
    "json_invalid": "it is no JSON ({error})",
}


def mistake(found: dict) -> str:
    """One of pydantic's `errors()`, in words for people."""
    for kinds, words in _MISTAKES.items():
        if found["type"] in kinds.split("|"):
            return words.format(**found.get("ctx", {}))
    return found["msg"].removeprefix("Value error, ")


def unset(value: object) -> bool:
    """For `exclude_if`: a field that says nothing is not written, so values of before it existed keep their bytes."""
    return value is None or value == ()


def usual(default: object) -> Callable[[object], bool]:
    """For `exclude_if`, likewise: a field is not written at the value that held before it existed."""
    return lambda value: value == default


def canonical_json(value: BaseModel | dict | list) -> bytes:
    """The one byte string of a value: sorted keys, no spaces, UTF-8.  Equal values have equal bytes."""
    return _canonical(value.model_dump(mode="json") if isinstance(value, BaseModel) else value).encode()


# kept: json.dumps with options makes an encoder anew each time, which takes longer than a sample's facts
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def digest_of(value: BaseModel | dict | list) -> str:
    """sha256 (64 hex digits) of the canonical JSON: the identity of a recipe, a manifest, a request."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
