"""The answers in /openapi.json: pictures, streams, what is told of models, and errors."""

from typing import get_args

from diffusion.adapters.http.errors import ApiError
from diffusion.serving.receipt import Format, Receipt, ReworkReceipt

_TEXT, _WHOLE = {"type": "string"}, {"type": "integer", "minimum": 0}
_TEXTS = {"type": "array", "items": _TEXT}


def _object(required: dict[str, dict], optional: dict[str, dict] | None = None) -> dict:
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


_PICTURE = {"type": "string", "contentEncoding": "base64", "description": "In `output_format`"}
_RECEIPT = {"oneOf": [{"$ref": "#/components/schemas/Receipt"}, {"$ref": "#/components/schemas/ReworkReceipt"}]}
_OFF = {"consistency": {"type": "number", "minimum": 0, "description": "Of a restored one: ||A x - y|| / sqrt(dim y)"}}
_NOTES = {"notes": {**_TEXTS, "description": "What was done to the given picture first"}}
_NAMES = {"model": _TEXT, "version": _TEXT, "seed": _WHOLE}
_NAMED = {"model": _TEXT, "version": _TEXT}
_LOADED = _NAMED | {
    "bundle_digest": _TEXT,
    "self_test_sha256": {**_TEXT, "description": "Of the pixels drawn when the model was loaded"},
    **dict.fromkeys(("slots", "drawing", "waiting"), _WHOLE),
}
_EVENT = {
    "type": _TEXT,
    "created_at": _WHOLE,
    "output_format": {"enum": list(get_args(Format))},
    "quality": _TEXT,
    "background": _TEXT,
}
_SCHEMAS = {
    "Pictures": _object(
        _NAMES
        | {
            "created": _WHOLE,
            "output_format": {"enum": list(get_args(Format))},
            "data": {
                "type": "array",
                "minItems": 1,
                "items": _object({"b64_json": _PICTURE, "receipt": _RECEIPT}, _OFF),
            },
        },
        _NOTES,
    ),
    "Event": {
        "description": "The data of a server-sent event, whose name is its `type`",
        "oneOf": [
            _object(
                _EVENT
                | {
                    "type": {"enum": ["image_generation.partial_image", "image_edit.partial_image"]},
                    "b64_json": _PICTURE,
                    "partial_image_index": _WHOLE,
                    "image": _WHOLE,
                    "size": _TEXT,
                }
            ),
            _object(
                _EVENT
                | {
                    "type": {"enum": ["image_generation.completed", "image_edit.completed"]},
                    "b64_json": _PICTURE,
                    "image": _WHOLE,
                    "receipt": _RECEIPT,
                    "usage": _object(dict.fromkeys(("total_tokens", "input_tokens", "output_tokens"), _WHOLE)),
                },
                _OFF | _NOTES,
            ),
            _object(_EVENT | {"type": {"enum": ["error"]}, "error": {"$ref": "#/components/schemas/Mistake"}}),
        ],
    },
    "Mistake": _object(
        {
            "message": {**_TEXT, "description": "What is wrong, and what to ask instead"},
            "type": {"enum": sorted({ApiError(status, "").body["error"]["type"] for status in range(400, 600)})},
            "param": {"type": ["string", "null"], "description": "The field"},
            "allowed": {"type": ["array", "object", "null"], "description": "What it may be: values, or bounds"},
        }
    ),
    "Error": _object({"error": {"$ref": "#/components/schemas/Mistake"}}),
    "Health": _object(
        {
            "status": {**_TEXT, "description": "ok, or what is wrong"},
            "loaded": {"type": "array", "items": _object(_LOADED)},
            "loading": {"type": "array", "items": _object(_NAMED)},
            "failed": {"type": "array", "items": _object(_NAMED | {"reason": _TEXT})},
            "refused": {"type": ["object", "null"], "description": "What was to be served and is not, and why"},
        },
        {
            **_LOADED,
            "batch_sizes": {"type": "array", "items": _WHOLE},
            "batch_seconds": {"type": "object", "additionalProperties": {"type": "number"}},
        },
    ),
    "Models": _object(
        {"object": {"enum": ["list"]}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}
    ),
    "Model": _object(
        {
            "id": {**_TEXT, "description": "What `model` is to be"},
            "object": {"enum": ["model"]},
            "created": _WHOLE,
            "owned_by": _TEXT,
            "name": _TEXT,
            "version": _TEXT,
            "bundle_digest": _TEXT,
            "run_digest": _TEXT,
            "dataset_digest": _TEXT,
            "classes": _TEXTS,
            "prompts": {"type": "boolean", "description": "Whether it reads captions"},
            "resolution": _WHOLE,
            "sizes": {**_TEXTS, "description": "WIDTHxHEIGHT"},
            "parameters": _WHOLE,
            "guidance_kinds": _TEXTS,
            "samplers": _TEXTS,
            "fixed": {**_TEXTS, "description": "Fields that may not be other than their defaults"},
            "restorations": _TEXTS,
            "trained_restorations": _TEXTS,
            "factors": {"type": "array", "items": _WHOLE},
            "edits": {"type": "boolean"},
            "edit_masks": {"type": "boolean"},
            "limits": _object({"max_n": _WHOLE, "max_steps": _WHOLE, "queue": _WHOLE, "timeout_s": {"type": "number"}}),
            "defaults": _object(
                {"sampler": _TEXT, "steps": _WHOLE, "guidance": {"type": "number"}, "guidance_kind": _TEXT}
            ),
        }
    ),
}
_OF_ONE = {**_TEXT, "description": "From the receipt, percent-encoded"}
_RECEIPT_HEADERS = {
    f"X-Diffusion-{name.replace('_', '-').title()}": {
        "schema": _TEXT,
        "description": "From the receipt, percent-encoded",
    }
    for name in (*Receipt.model_fields, *ReworkReceipt.model_fields)
    if name not in ("format", "torch", "device")
}
_WHAT = {
    400: "The body cannot be read",
    401: "No known key",
    403: "A page of another site, or a name that this endpoint without keys does not answer to",
    404: "No such model or path",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "Content-Type is another",
    422: "A field is wrong: the error has its name and what it may be",
    429: "The key has used up what it may",
    500: "The pictures could not be drawn",
    503: "The queue is full, or the server is shutting down",
    504: "The pictures were not done by the deadline",
}
_SECONDS = {
    "schema": {"type": "integer", "minimum": 1},
    "required": True,
    "description": "Seconds to wait before asking",
}
_HEADERS = {
    401: {"WWW-Authenticate": {"schema": _TEXT, "required": True}},
    429: {"Retry-After": _SECONDS},
    503: {"Retry-After": _SECONDS},
}


def answer(name: str, what: str = "Done") -> dict:
    """JSON of one of the schemas."""
    return {"description": what, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}


def text(kind: str, what: str) -> dict:
    """Text of a content type."""
    return {"description": what, "content": {kind: {"schema": _TEXT}}}


def errors(*statuses: int) -> dict[str, dict]:
    """Answers of these statuses."""
    return {
        str(status): answer("Error", _WHAT[status]) | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in statuses
    }


_EVENT_DATA = {**_TEXT, "contentMediaType": "application/json", "contentSchema": {"$ref": "#/components/schemas/Event"}}
CARDS, HEALTH = "Models", "Health"
STREAMED = {
    "description": "The pictures: as JSON; one bare, with `response_format` or Accept; with `stream` as events",
    "headers": _RECEIPT_HEADERS,
    "content": {
        **answer("Pictures")["content"],
        **{f"image/{format}": {"schema": {"type": "string", "format": "binary"}} for format in get_args(Format)},
        "text/event-stream": {
            "schema": {**_object({"event": _TEXT, "data": _EVENT_DATA}), "description": "Of each event"}
        },
    },
}


def components(guarded: bool) -> dict:
    """What the paths refer to."""
    schemas = {kind.__name__: kind.model_json_schema() for kind in (Receipt, ReworkReceipt)}
    found = {"schemas": _SCHEMAS | schemas}
    if guarded:
        found["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": "`diffusion keys add NAME`"}
        }
    return found
