"""The endpoints."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from collections.abc import AsyncGenerator, Awaitable, Collection, Mapping
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Send

from penstock import __version__
from penstock.serve.http import errors, responses
from penstock.serve.http.chats import ask
from penstock.serve.http.errors import ApiError
from penstock.serve.http.guard import Guard
from penstock.serve.http.names import NAME, RequestNames
from penstock.serve.http.protocol import Chat, Completion, Detokenize, Tokenize
from penstock.serve.http.responses import Chats, Completions, Shapes
from penstock.serve.http.service import Generation, Piece, Service
from penstock.serve.observe.history import Course

R = TypeVar("R")
router = APIRouter(responses={"4XX": {"description": "The request is at fault."}, "5XX": {"description": "We are."}})
STREAMED: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}}}

#: Seconds after which the live page hears from an engine that does nothing.
QUIET = 1.0

#: The page's scripts and styles are in it; it talks to this server alone, and nobody may frame it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(service: Service, keys: Collection[str], local: bool) -> FastAPI:
    """The application. ``keys`` and ``local`` are :class:`~penstock.serve.http.guard.Guard`'s."""
    app = FastAPI(title="Penstock", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_middleware(Guard, keys=keys, local=local, body=round(service.limits.body * 2**20))
    errors.install(app)
    app.add_middleware(RequestNames)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(_service)]


class EventStream(StreamingResponse):
    """Server-sent events. Its source is closed with it, whatever ends it: a client that leaves ends its request."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[bytes], headers: Mapping[str, str] | None = None) -> None:
        # No proxy may wait for more of it.
        super().__init__(source, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        self._source = source

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._source):
            await super().stream_response(send)


def event(value: Any) -> bytes:
    """``value`` as a server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def unless_gone(request: Request, work: Awaitable[R]) -> R:
    """The result of ``work``, which ends when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away")
        return await task
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


@router.post("/v1/completions", responses=STREAMED)
async def completions(request: Request, body: Completion, service: Here) -> Response:
    """Continues one prompt or several."""
    service.check_model(body.model)
    headers = service.ignored(body)
    if body.stream and body.best_of not in (None, body.n):
        raise ApiError(400, "which continuations are best is known at the end: nothing to stream", param="best_of")
    service.admit(body.n * len(body.prompts()))  # before any work goes into them
    prompts = [await service.encoded(prompt, body) for prompt in body.prompts()]
    generation = Generation(service, Completions.kind, prompts, body, request.state.key)
    shapes = Completions(service.tokens, prompts, body)
    return await _answer(request, service, generation, shapes, body, headers)


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat(request: Request, body: Chat, service: Here) -> Response:
    """Answers a chat."""
    service.check_model(body.model)
    headers = service.ignored(body)
    prompt, extra, form = await asyncio.to_thread(ask, body, service.tokens, service.engine.ready.context)
    generation = Generation(
        service, Chats.kind, [service.checked(prompt, "messages")], body, request.state.key, **extra
    )
    shapes = Chats(service.tokens, prompt, body, form)
    return await _answer(request, service, generation, shapes, body, headers)


async def _answer(
    request: Request,
    service: Service,
    generation: Generation,
    shapes: Shapes,
    body: Completion | Chat,
    headers: Mapping[str, str],
) -> Response:
    pieces = generation.pieces(shapes.shown, shapes.over)
    # Where the client gave no name of its own, the response's is the one that GET /v1/requests/ID/events knows.
    headers = headers if NAME in request.headers else {**headers, NAME: generation.id}
    if not body.stream:

        async def all_of_it() -> list[Piece]:
            return [piece async for piece in pieces]

        whole = generation.chosen(await unless_gone(request, all_of_it()))
        return JSONResponse(
            responses.head(generation, shapes.whole, service.name)
            | {"choices": [shapes.choice(piece) for piece in whole], "usage": generation.usage.record()}
            | shapes.about(whole),
            headers=headers,
        )
    # The first piece is waited for, so that a request that is refused gets a status that says so.
    first = await unless_gone(request, anext(pieces))
    usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_chunks(service, generation, first, pieces, shapes, usage), headers)


async def _chunks(
    service: Service,
    generation: Generation,
    first: Piece,
    pieces: AsyncGenerator[Piece],
    shapes: Shapes,
    usage: bool,
) -> AsyncGenerator[bytes]:
    head, about = responses.head(generation, shapes.chunk, service.name), shapes.about([])
    opened = set()
    async with aclosing(pieces):
        try:
            piece: Piece | None = first
            while piece is not None:
                if piece.choice not in opened:
                    opened.add(piece.choice)
                    opening = shapes.opening(piece.choice)
                    if opening is not None:
                        yield event(head | {"choices": [opening]} | about)
                        about = {}
                if piece.text or piece.finish or piece.tokens or piece.prompt_logprobs:
                    for delta in shapes.deltas(piece):
                        yield event(head | {"choices": [delta]})
                piece = await anext(pieces, None)
        except Exception as error:  # whatever it is, the client learns that its answer ends here, and is none
            generation.outcome = "error"
            yield event(errors.told(error)[1])
            return
    if usage:
        yield event(head | {"choices": [], "usage": generation.usage.record()})
    yield b"data: [DONE]\n\n"


@router.get("/v1/models")
async def models(service: Here) -> dict[str, Any]:
    """The model that is served here."""
    return {"object": "list", "data": [_model(service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Here) -> dict[str, Any]:
    """The model of this name, if it is served here."""
    service.check_model(name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "penstock",
        "max_model_len": service.engine.ready.context,
    }


@router.post("/tokenize")
async def tokenize(body: Tokenize, service: Here, response: Response) -> dict[str, Any]:
    """The tokens of a text, or of a chat as the model would read it."""
    service.check_model(body.model)
    response.headers.update(service.ignored(body))
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.messages is not None:
        messages = [message.for_template() for message in body.messages]
        tokens = (await asyncio.to_thread(service.tokens.chat, messages, body.tools, {})).tokens
    else:
        tokens = await asyncio.to_thread(service.tokens.encode, body.prompt or "", body.add_special_tokens)
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
    """200 while requests are served; 503 once the engine is dead, or the server ends."""
    if service.engine.failure is not None:
        raise service.engine.failure
    return JSONResponse({"status": "draining" if service.draining else "ok"}, 503 if service.draining else 200)


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
