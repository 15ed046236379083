"""/openapi.json: what the routes take and answer, of the model that is served now and within this endpoint's limits.

It is written here, and not gathered from the routes, which read their bodies themselves; a test holds it against what they
do, route by route, with data that fits it and data that does not (tests/integration/test_openapi.py).
"""

from diffusion.adapters.http import page
from diffusion.adapters.http.schema_answers import (
    CARDS,
    HEALTH,
    STREAMED,
    answer,
    components,
    errors,
    text,
)
from diffusion.adapters.http.schema_bodies import edit, generation, offered, restoration, variation

_DRAWS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)  # what a request for pictures may be refused with
_REQUEST_ID = {
    "name": "X-Request-ID",
    "in": "header",
    "required": False,
    "schema": {"type": "string"},
    "description": "Echoed where it is printable ASCII of up to 128 characters; else the answer has a new one",
}


def document(cards: list[dict], guarded: bool) -> dict:
    """The OpenAPI 3.1 document, JSON values.  cards: what GET /v1/models says; guarded: whether a key is wanted at present.

    With several models a field has what any of them takes.
    """
    offer = offered(cards)
    secured = {"security": [{"key": []}]} if guarded else {}
    asked = {
        "/v1/images/generations": ("Draw pictures by class or caption", generation(offer, guarded)),
        "/v1/images/edits": ("Change a picture, or draw a part of it anew", edit(offer, guarded)),
        "/v1/images/restorations": ("Super-resolution, inpainting, colorization", restoration(offer, guarded)),
        "/v1/images/variations": ("Draw pictures like a given one", variation(offer, guarded)),
    }
    paths: dict[str, dict] = {}
    for path, (summary, body) in asked.items():
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.rpartition("/")[2],
                **secured,
                "requestBody": {"required": True, "content": body},
                "responses": {"200": STREAMED, **errors(*_DRAWS)},
            }
        }
    read = {"401", "403"} if guarded else {"403"}
    paths["/v1/models"] = _got(
        "The models that can be asked", answer(CARDS), errors(*map(int, sorted(read))), **secured
    )
    numbers = text("text/plain", "Counts and times for Prometheus")
    paths["/metrics"] = _got("Counts and times for Prometheus", numbers, errors(*map(int, sorted(read))), **secured)
    health = answer(HEALTH), {"503": answer(HEALTH, "The engine stopped, or is stuck")}
    paths["/healthz"] = _got("Whether the engine is alive", *health, head=True)
    paths["/"] = _got("A page for all of this", text("text/html", "The page"), {}, head=True)
    paths["/page/{name}"] = _got("A file of the page", _PART, errors(404), parameters=[_NAME])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "diffusion",
            "version": cards[0]["version"],
            "description": "Errors say what is wrong, and what may be asked instead.",
        },
        "paths": _with_ids(paths),
        "components": components(guarded),
    }


_NAME = {"name": "name", "in": "path", "required": True, "schema": {"enum": sorted(page.FILES)}}
_PART = {
    "description": "The file",
    "content": {kind: {"schema": {"type": "string"}} for kind in ("text/css", "text/javascript", "text/html")},
}


def _got(summary: str, good: dict, bad: dict, *, head: bool = False, **more: object) -> dict:
    """A path that is read."""
    operation = {"summary": summary, **more, "responses": {"200": good, **bad}}
    if not head:
        return {"get": operation}
    bare = {status: {"description": found["description"]} for status, found in operation["responses"].items()}
    return {"get": operation, "head": {**operation, "responses": bare}}


def _with_ids(paths: dict[str, dict]) -> dict[str, dict]:
    """Every operation takes an id, and every answer has one."""
    echoed = {"X-Request-ID": {"schema": {"type": "string"}, "required": True, "description": "The request's id"}}
    return {
        path: {
            method: {
                **operation,
                "parameters": [_REQUEST_ID, *operation.get("parameters", [])],
                "responses": {
                    status: {**found, "headers": echoed | found.get("headers", {})}
                    for status, found in operation["responses"].items()
                },
            }
            for method, operation in methods.items()
        }
        for path, methods in paths.items()
    }
