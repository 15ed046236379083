"""Answers that are not pictures: JSON, {"error": {"message", "type", "param", "allowed"}}.

400 not JSON or no form, 401 without a known key, 403 from another site's page, 404 no such model or path, 408 the body did
not come, 413 too large, 415 of another type, 422 a field is wrong, 429 with Retry-After when a key has used up what it may,
503 with Retry-After when it would wait too long, 504 past the deadline.
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from diffusion.adapters.http.account import Account
from diffusion.serving.lineup import UnknownModel
from diffusion.serving.request import RequestError
from diffusion.serving.shelf import Refused
from diffusion.serving.ticket import DeadlineExceeded, DrawingFailed, EngineStopped, QueueFull, TooBusy

_log = logging.getLogger(__name__)
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


_REASONS = {  # of the statuses that have but one
    401: "key",
    408: "slow",
    413: "size",
    499: "cancelled",
    500: "failed",
    504: "deadline",
}


class ApiError(Exception):
    """An answer that is not pictures.  reason: a word for logs and metrics; None: the status's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        allowed: Any = None,
        retry_after_s: int | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.reason = status, reason or _REASONS.get(status, "invalid")
        self.body = {"error": {"message": message, "type": kind, "param": param, "allowed": allowed}}
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def told(error: Exception, request_id: str = "") -> ApiError:
    """What a client is told of an error: of one inside nothing but that there was one; the log has it, with the id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(422, str(error), param=error.param, allowed=error.allowed)
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), param="model", allowed=error.allowed)
    if isinstance(error, Refused):
        return ApiError(
            503, "the model cannot be loaded now; /healthz says why", param="model", retry_after_s=60, reason="unloaded"
        )
    if isinstance(error, QueueFull):
        return ApiError(503, str(error), retry_after_s=error.retry_after_s, reason="queue")
    if isinstance(error, TooBusy):
        return ApiError(503, str(error), retry_after_s=error.retry_after_s, reason="busy")
    if isinstance(error, EngineStopped):
        return ApiError(503, "this server is shutting down; ask again", retry_after_s=1, reason="stopping")
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, f"{error}: ask for fewer pictures or steps, or when there is less load")
    _log.error("request %s failed: %s", request_id, error)
    return ApiError(500, "the pictures could not be drawn; the server's log says why")


def install(app: FastAPI) -> None:
    """Make the application answer all errors this way."""

    async def refused(request: Request, error: Exception) -> Response:
        account = Account.of(request.scope)
        answer = told(error, account.id)
        account.reason = answer.reason
        return answer.response()

    async def wrong_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}; see /openapi.json"
        Account.of(request.scope).reason = "invalid"
        answer = ApiError(error.status_code, message).response()
        answer.headers.update(error.headers or {})
        return answer

    known = (
        ApiError,
        RequestError,
        UnknownModel,
        Refused,
        QueueFull,
        TooBusy,
        EngineStopped,
        DeadlineExceeded,
        DrawingFailed,
    )
    for kind in known:
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(HTTPException, wrong_path)
