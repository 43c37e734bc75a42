"""Errors over HTTP, all in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``. Anthropic's has a
``type`` beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.core.errors import PenstockError, UsageError
from penstock.core.faults import faults
from penstock.serve.link.client import EngineDiedError
from penstock.serve.replicas.replica import ReplicaLostError
from penstock.serve.routing.dispatcher import NoReplicaError

log = logging.getLogger(__name__)

#: OpenAI's names for kinds of errors, by status.
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

#: The endpoint whose clients are Anthropic's.
MESSAGES = "/v1/messages"

#: What Python's types are called in JSON.
IN_JSON = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "true or false"}


class ApiError(PenstockError):
    """An error with a status of its own.

    Args:
        status: of the response.
        param: the field at fault.
        code: OpenAI's word for the error, where it has one.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(what)
        self.status, self.param, self.code, self.headers = status, param, code, headers


def content(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of ``error`` and the body that tells of it."""
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    if isinstance(error, ApiError):
        status, message = error.status, str(error)
    elif isinstance(error, RequestValidationError):
        status, (message, param) = 400, _first_fault(error)
    elif isinstance(error, HTTPException):
        status, message = error.status_code, _unread(error.__cause__) or str(error.detail)
    elif isinstance(error, NoReplicaError | ReplicaLostError):
        status, message, code = 503, str(error), "no_replica" if isinstance(error, NoReplicaError) else "replica_lost"
    elif isinstance(error, EngineDiedError):
        status, message, code = 503, f"{error}; the server ends", "engine_died"
    elif isinstance(error, UsageError):
        status, message = 400, str(error)
    else:
        status, message = 500, "the server failed at this request; its log says more"
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_anthropic(body: dict[str, Any]) -> dict[str, Any]:
    """The ``body`` that tells of an error, in Anthropic's shape."""
    kind = body["error"]["type"]
    return {"type": "error", "error": {**body["error"], "type": "api_error" if kind == "server_error" else kind}}


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """The same. What is no client's fault goes to the log, with all that the client does not learn."""
    if not isinstance(error, (PenstockError, RequestValidationError, HTTPException)):
        log.error("a request failed", exc_info=error)
    return content(error)


def response(error: Exception, path: str) -> JSONResponse:
    """The response that tells of ``error``, which a request to ``path`` met."""
    status, body = told(error)
    if path.startswith(MESSAGES):
        body = as_anthropic(body)
    return JSONResponse(body, status, headers=getattr(error, "headers", None))


def _first_fault(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong, and with which field."""
    found = error.errors()
    if found[0]["type"] == "json_invalid":
        return f"the body is not JSON: {found[0].get('ctx', {}).get('error', found[0]['msg'])}", None
    if found[0]["loc"][0] == "body":
        place, fault = faults([each | {"loc": each["loc"][1:]} for each in found], error.body)[0]
    else:
        place, fault = found[0]["loc"][1:], found[0]
    if not place and error.body is None:
        return "there is no body: send a JSON object", None
    if not place and isinstance(error.body, bytes):
        return "the body is not taken for JSON: send the header Content-Type: application/json with it", None
    if not place and not isinstance(error.body, dict):
        return f"the body must be a JSON object, not {IN_JSON[type(error.body)]}", None
    name = ".".join(map(str, place))
    return f"{name or 'the body'}: {fault['msg'].removeprefix('Value error, ')}", str(place[0]) if place else None


def _unread(cause: BaseException | None) -> str | None:
    """Why a body could not be read, where that is what failed."""
    match cause:
        case RecursionError():
            return "the body has too many arrays or objects within each other"
        case UnicodeDecodeError():
            return "the body is not UTF-8"
        case ValueError():
            return f"the body cannot be read: {cause}"
    return None


def install(app: FastAPI) -> None:
    """Lets ``app`` answer every error in this shape."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            what = f"there is no {request.method} {request.url.path[:200]} here; GET /openapi.json has what there is"
            return response(ApiError(error.status_code, what, headers=error.headers), request.url.path)
        return response(error, request.url.path)

    for kind in (PenstockError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(Defects)


class Defects:
    """Answers whatever else ``app`` raises: no exception goes through to the connection, where other requests wait."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            if started:  # the client must see that its answer is cut off: the connection ends
                raise
            await response(error, scope.get("path", ""))(scope, receive, send)
