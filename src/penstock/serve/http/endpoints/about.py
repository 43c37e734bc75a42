"""What the server tells of itself, of its model, and of requests."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from penstock.serve.http.endpoints.here import Here
from penstock.serve.http.errors import ApiError
from penstock.serve.http.protocol.tokenizing import Detokenize, Tokenize
from penstock.serve.http.service import Service
from penstock.serve.http.streams import STREAMED, EventStream, event
from penstock.serve.observe.history import Course
from penstock.serve.replicas.states import described

router = APIRouter()

#: Seconds after which the live page hears from an engine that does nothing.
QUIET = 1.0

#: The page's scripts and styles are in it; it talks to this server alone, and nobody may frame it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/v1/models")
async def models(service: Here) -> dict[str, Any]:
    """The model that is served here, and its adapters."""
    names = ("", *service.engine.snapshot.adapters)
    return {"object": "list", "data": [_model(service, name) for name in names]}


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Here) -> dict[str, Any]:
    """The model of this name, if it is served here, or the adapter."""
    return _model(service, service.check_model(name))


def _model(service: Service, adapter: str) -> dict[str, Any]:
    return {
        "id": adapter or service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "penstock",
        "max_model_len": service.engine.ready.context,
        "parent": service.name if adapter else None,
    }


@router.post("/tokenize")
async def tokenize(body: Tokenize, service: Here, response: Response) -> dict[str, Any]:
    """The tokens of a text, or of a chat as the model would read it."""
    service.check_model(body.model)
    response.headers.update(service.ignored(body))
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.messages is not None:
        chat = body.chat()
        written = (*chat.for_template(), chat.add_special_tokens, chat.chat_template)
        tokens = (await asyncio.to_thread(service.tokens.chat, *written)).tokens
    else:
        special = body.add_special_tokens is not False
        tokens = await asyncio.to_thread(service.tokens.encode, body.prompt or "", special)
    return {"count": len(tokens), "max_model_len": service.engine.ready.context, "tokens": tokens}


@router.post("/detokenize")
async def detokenize(body: Detokenize, service: Here, response: Response) -> dict[str, Any]:
    """The text of tokens."""
    service.check_model(body.model)
    response.headers.update(service.ignored(body))
    service.check_tokens(body.tokens, "tokens")
    return {"prompt": await asyncio.to_thread(service.tokens.decode, body.tokens)}


@router.get("/health")
async def health(service: Here) -> Response:
    """200 while requests are served; 503 once the engine is dead, no replica takes requests, or the server ends."""
    if service.engine.failure is not None:
        raise service.engine.failure
    now = service.engine.snapshot
    status = "draining" if service.draining else "asleep" if now.asleep else "paused" if now.paused else "ok"
    if not now.replicas:
        return JSONResponse({"status": status}, 503 if service.draining else 200)
    ready = [each.state == "ready" for each in now.replicas]
    if status == "ok" and not all(ready):
        status = "degraded" if any(ready) else "unavailable"
    serves = any(ready) and not service.draining
    return JSONResponse({"status": status, "replicas": described(now.replicas)}, 200 if serves else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Here) -> Response:
    """Figures for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/events", responses=STREAMED)
async def events(service: Here) -> Response:
    """The engine's state as it changes, as server-sent events."""

    async def states() -> AsyncGenerator[bytes]:
        async with aclosing(service.engine.snapshots(QUIET)) as snapshots:
            async for snapshot in snapshots:
                if service.draining:
                    return
                yield event(snapshot)

    return EventStream(states())


@router.get("/v1/requests")
async def requests(service: Here, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
    """The newest requests, the newest first, and what became of each."""
    return {"object": "list", "data": [_brief(id, service.history.of(id)) for id in service.history.newest(limit)]}


def _brief(id: str, courses: list[Course]) -> dict[str, Any]:
    return {
        "id": id,
        "object": "request",
        "arrived": courses[0].arrived,
        "states": [course.state for course in courses],
        "preemptions": sum(course.preemptions for course in courses),
    }


@router.delete("/v1/requests/{id:path}")
async def abort(id: str, request: Request, service: Here) -> dict[str, Any]:
    """Ends a request that is under way; its client gets what there is."""
    service.abort(id, request.state.key)
    return {"id": id, "object": "request", "aborted": True}


@router.get("/v1/requests/{id:path}/events")
async def request_events(id: str, service: Here) -> dict[str, Any]:
    """What became of a request, and why it took its time: a record for each of its continuations."""
    return {
        "id": id,
        "object": "request.events",
        "continuations": [course.record(time.time()) for course in service.courses(id)],
    }


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The page to chat with the model, and to watch the engine."""
    page = importlib.resources.files("penstock.serve.http") / "page.html"
    return HTMLResponse(page.read_text(encoding="utf-8"), headers={"Content-Security-Policy": PAGE_POLICY})
