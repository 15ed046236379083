"""The HTTP face of an engine: POST /v1/images/generations, GET /v1/models, GET /healthz and a page for people at /.

Errors are JSON, {"error": {"message", "type", "param", "allowed"}}: 400 not JSON, 404 no such model or path, 413 too
large, 415 not sent as JSON, 422 a field is wrong, 503 with Retry-After when the queue is full, 504 past the deadline.
"""

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import Field
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion.adapters.page import PAGE
from diffusion.data.pictures.buckets import shown
from diffusion.recipe import ServeRecipe
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import Receipt, headers, receipt_of, stamp
from diffusion.serving.request import GenerateRequest, RequestError, ResolvedRequest, once_each, parse, resolve
from diffusion.serving.ticket import DeadlineExceeded, DrawingFailed, EngineStopped, Picture, QueueFull, Ticket
from diffusion.store.refs import ModelRef

MAX_BODY_BYTES = 64 * 1024
_log = logging.getLogger(__name__)
_TYPES = {404: "not_found_error", 503: "overloaded_error", 504: "timeout_error"}


class GenerationBody(GenerateRequest):
    """The body of POST /v1/images/generations."""

    model: str | None = Field(None, description="Name of the model served here; null: whichever it is")
    response_format: Literal["b64_json", "png"] | None = Field(
        None, description="JSON with PNGs in base64, or one bare PNG; null: what the Accept header prefers"
    )


class ApiError(Exception):
    """An answer that is not pictures."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        allowed: Any = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "allowed": allowed}}
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def create_app(engine: Engine, model: ModelRef, limits: ServeRecipe, *, self_test: str) -> FastAPI:
    """The application around a started engine that draws with `model`.

    self_test: sha256 of the picture that the engine drew when it was loaded, which /healthz reports.
    """
    # the interactive documentation would fetch scripts from a foreign host
    app = FastAPI(title="diffusion", version=model.version, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(_SecureHeaders)
    spec = engine.bundle.spec
    began = int(time.time())

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestError)
    async def wrong_field(_: Request, error: RequestError) -> Response:
        return ApiError(422, str(error), param=error.param, allowed=error.allowed).response()

    @app.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}; see /openapi.json"
        answer = ApiError(error.status_code, message).response()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(DrawingFailed)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        _log.error("request failed: %s", error)
        return ApiError(500, "the pictures could not be drawn; the server's log says why").response()

    @app.post(
        "/v1/images/generations",
        openapi_extra={
            "requestBody": {"content": {"application/json": {"schema": GenerationBody.model_json_schema()}}}
        },
    )
    async def generate(request: Request) -> Response:
        body = parse(GenerationBody, await _json_object(request), limits)
        if body.model not in (None, model.name):
            message = f"model={body.model[:80]!r} is not served here, {model.name!r} is"
            raise ApiError(404, message, param="model", allowed=[model.name])
        bare = _wants_png(body, request)
        wanted = resolve(body, spec, limits)
        try:
            pictures = await _drawn(request, engine.submit(engine.job(wanted)))
        except QueueFull as error:
            raise ApiError(503, str(error), retry_after_s=error.retry_after_s) from None
        except EngineStopped:
            raise ApiError(503, "this server is shutting down; ask again", retry_after_s=1) from None
        except DeadlineExceeded as error:
            raise ApiError(504, f"{error}: ask for fewer pictures or steps, or when there is less load") from None
        stamped = await asyncio.to_thread(_stamped, pictures, wanted, engine, model)
        return _png(*stamped[0]) if bare else _json(stamped, wanted, model)

    @app.get("/v1/models")
    async def models() -> dict:
        card = {
            "id": model.name,
            "object": "model",
            "created": began,
            "owned_by": "diffusion",
            "version": model.version,
            "bundle_digest": model.digest,
            "run_digest": model.run_digest,
            "dataset_digest": model.dataset_digest,
            "classes": spec.classes,
            "prompts": spec.text is not None,
            "resolution": spec.resolution,
            "sizes": [shown(size) for size in spec.sizes or (spec.size,)],
            "parameters": spec.parameters,
            "guidance_kinds": spec.guidance_kinds,
            "limits": limits.model_dump(include={"max_n", "max_steps", "queue", "timeout_s"}),
            "defaults": {
                name: getattr(spec.sampling, name) for name in ("sampler", "steps", "guidance", "guidance_kind")
            },
        }
        return {"object": "list", "data": [card]}

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def health() -> Response:
        alive = engine.alive()
        state = {
            "status": "ok" if alive else "engine stopped or stuck",
            "model": model.name,
            "version": model.version,
            "bundle_digest": model.digest,
            "self_test_sha256": self_test,
            "batch_sizes": engine.ladder.sizes,
            **engine.load(),
        }
        return JSONResponse(state, 200 if alive else 503)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE

    return app


async def _json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object.  Raises ApiError 400, 413 or 415, and RequestError for a name that is there twice."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # this also keeps other sites' forms out: a browser asks before it sends this type across origins
        raise ApiError(415, f"Content-Type is {kind[:80]!r}: send JSON with 'Content-Type: application/json'")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes")
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


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _wants_png(body: GenerationBody, request: Request) -> bool:
    """Whether to answer with one bare PNG.  Raises RequestError where that is asked for and there are several."""
    accept = request.headers.get("accept", "")
    bare = body.response_format == "png" or (
        body.response_format is None and accept.startswith(("image/png", "image/*"))
    )
    if bare and body.n > 1:
        raise RequestError(
            f"n={body.n}: a bare PNG is one picture. Ask for response_format=b64_json (and JSON in Accept), or n=1",
            param="n",
            allowed=[1],
        )
    return bare


async def _drawn(request: Request, ticket: Ticket) -> list[Picture]:
    """The ticket's pictures.  When the client goes away the ticket is cancelled, and with it its slots."""
    gone = asyncio.ensure_future(_disconnected(request.receive))
    drawing = asyncio.wrap_future(ticket.future)
    try:
        await asyncio.wait({drawing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ApiError(499, "the client closed the connection")
        return drawing.result()
    finally:
        ticket.cancel()
        drawing.cancel()
        gone.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _stamped(
    pictures: list[Picture], wanted: ResolvedRequest, engine: Engine, model: ModelRef
) -> list[tuple[bytes, Receipt]]:
    """Each picture as PNG with its receipt."""
    receipts = [
        receipt_of(
            picture,
            i,
            wanted,
            engine.bundle.spec,
            bundle_digest=engine.bundle.digest,
            model=model.name,
            version=model.version,
            device=engine.device,
        )
        for i, picture in enumerate(pictures)
    ]
    return [(stamp(picture, receipt), receipt) for picture, receipt in zip(pictures, receipts, strict=True)]


def _png(png: bytes, receipt: Receipt) -> Response:
    return Response(png, media_type="image/png", headers=headers(receipt))


def _json(stamped: list[tuple[bytes, Receipt]], wanted: ResolvedRequest, model: ModelRef) -> Response:
    data = [
        {"b64_json": base64.b64encode(png).decode(), "receipt": receipt.model_dump(mode="json")}
        for png, receipt in stamped
    ]
    about = {"model": model.name, "version": model.version, "seed": wanted.seed, "output_format": "png"}
    shared = {
        name: value for name, value in headers(stamped[0][1]).items() if not name.endswith(("-Image", "-Pixels-Sha256"))
    }
    return JSONResponse({"created": int(time.time()), **about, "data": data}, headers=shared)


class _SecureHeaders:
    """Headers every answer carries, whoever made it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        script, style = (_csp_hash(PAGE, tag) for tag in ("script", "style"))
        self.fixed = {
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
            "Content-Security-Policy": f"default-src 'none'; script-src {script}; style-src {style}; img-src data:;"
            " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.fixed)
            await send(message)

        await self.app(scope, receive, send_with if scope["type"] == "http" else send)


def _csp_hash(page: str, tag: str) -> str:
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
