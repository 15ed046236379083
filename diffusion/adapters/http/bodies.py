"""Bodies of requests, read within their limits: a JSON object, or a form of fields and files."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable
from typing import Any, NamedTuple

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from diffusion.adapters.http.errors import ApiError
from diffusion.recipe import Frozen
from diffusion.serving.given import Given
from diffusion.serving.request import RequestError, once_each

MAX_BODY_BYTES = 64 * 1024  # of JSON
MAX_UPLOAD_BYTES = 32 * 2**20  # of a form with its pictures
MAX_BODY_S = 120.0  # from its first byte to its last
_MAX_FIELDS, _MAX_FILES = 40, 4


class Form(NamedTuple):
    """The fields of a form, as text until they are `typed`, and its files."""

    fields: dict[str, Any]
    files: dict[str, bytes]


def check_type(request: Request, wanted: str) -> None:
    """Raises ApiError 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        # this also keeps other sites' forms from asking in JSON: a browser asks first before it sends that across origins
        what = "JSON" if wanted == "application/json" else "a form"
        raise ApiError(415, f"Content-Type is {kind[:80]!r}: send {what} with 'Content-Type: {wanted}'")


async def json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.  Raises ApiError 400, 408, 413 or 415, and RequestError for a name that is there twice."""
    check_type(request, "application/json")
    body = bytearray()
    async for part in _limited(request, MAX_BODY_BYTES):
        body += part
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=once_each)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
        raise ApiError(400, f"the body is {kinds.get(type(value), 'a number')}, not a JSON object")
    return value


async def form(request: Request, files: Iterable[str]) -> Form:
    """The body as a form.  files: names of the fields that are files; `name[]` is another spelling of theirs.

    Raises ApiError 400, 408, 413, 415, and RequestError for a field that is there twice, or text where a file is wanted.
    """
    check_type(request, "multipart/form-data")
    _check_origin(request)
    parser = MultiPartParser(
        request.headers,
        _limited(request, MAX_UPLOAD_BYTES),
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=MAX_BODY_BYTES,
    )
    try:
        read = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the body is no form: {error.message}") from None
    except KeyError:  # of the header's boundary
        raise ApiError(400, "the body is no form: Content-Type names no boundary") from None
    wanted, found = set(files), Form({}, {})
    try:
        for spelt, value in read.multi_items():
            name = spelt.removesuffix("[]") if spelt.removesuffix("[]") in wanted else spelt
            if name in found.fields or name in found.files:
                raise RequestError(f"{name[:80]} is given twice: give it once", param=name[:80])
            if isinstance(value, UploadFile) != (name in wanted):
                as_file = f"is a file, as `-F {name}=@picture.png`"
                as_text = f"is no file here: files are {', '.join(sorted(wanted))}"
                raise RequestError(f"{name[:80]} {as_file if name in wanted else as_text}", param=name[:80])
            if isinstance(value, UploadFile):
                found.files[name] = await value.read()
            else:
                found.fields[name] = value
    finally:
        await read.close()
    return found


def typed(model: type[Frozen], fields: dict[str, str]) -> dict[str, Any]:
    """Fields of a form as the JSON values that they are of in `model`; what cannot be that stays text, to be refused."""
    properties, values = model.model_json_schema()["properties"], {}
    for name, text in fields.items():
        schema = properties.get(name, {})
        kinds = {branch.get("type") for branch in schema.get("anyOf", [schema])}
        values[name] = _value(text.strip(), kinds) if kinds & {"integer", "number", "boolean"} else text
        if text == "" and "null" in kinds:
            values[name] = None
    return values


def picture(found: Form, name: str) -> Given:
    """A file of a form as a picture.  Raises RequestError where it is missing, or cannot be read as one."""
    if name not in found.files:
        raise RequestError(f"{name} is missing: send the picture's file, as `-F {name}=@picture.png`", param=name)
    return Given.of(found.files[name], name)


def _value(text: str, kinds: set[str]) -> Any:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = number if kinds & {"integer", "number"} else isinstance(value, bool)
    return value if fits else text


def _check_origin(request: Request) -> None:
    """Raises ApiError 403 for a form that another site's page has sent, about which no browser asks first."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise ApiError(403, f"the page of {origin[:80]!r} may not ask this server")


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes.  Raises ApiError 408, 413, and 499 where the client leaves in the middle of it."""
    length, parts = 0, aiter(request.stream())
    deadline = asyncio.get_running_loop().time() + MAX_BODY_S
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:  # whoever sends a byte now and then would hold a key's place for ever
            raise ApiError(408, f"the body was not there within {MAX_BODY_S:g} s: send it faster, or less") from None
        except ClientDisconnect:
            raise ApiError(499, "the client closed the connection") from None
        length += len(part)
        if length > limit:
            raise ApiError(413, f"the body is longer than {limit} bytes")
        yield part


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
