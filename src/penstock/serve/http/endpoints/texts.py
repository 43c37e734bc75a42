"""OpenAI's endpoints for texts and chats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from penstock.serve.http.chats import ask
from penstock.serve.http.endpoints.here import WRITES, Here
from penstock.serve.http.errors import ApiError, told
from penstock.serve.http.names import NAME
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.completions import Completion
from penstock.serve.http.searches import searched
from penstock.serve.http.service import Generation, Piece, Service
from penstock.serve.http.shapes.chats import Chats
from penstock.serve.http.shapes.choices import head
from penstock.serve.http.shapes.completions import Completions
from penstock.serve.http.streams import STREAMED, EventStream, event, gathered, unless_gone

router = APIRouter(dependencies=[WRITES])


@router.post("/v1/completions", responses=STREAMED)
async def completions(request: Request, body: Completion, service: Here) -> Response:
    """Continues one prompt or several."""
    service.check_model(body.model)
    headers = service.ignored(body)
    if body.stream and body.best_of not in (None, body.n):
        raise ApiError(400, "which continuations are best is known at the end: nothing to stream", param="best_of")
    service.admit(body.n * len(body.prompts()))  # before any work goes into them
    contexts = await service.contexts(body)
    before = service.tokens.encode(body.contexts_prefix, body.add_special_tokens) if contexts else []
    prompts = [before + await service.encoded(prompt, body) for prompt in body.prompts()]
    generation = Generation(
        service, Completions.kind, prompts, body, request.state.key, contexts=contexts, shared=len(before)
    )
    shapes = Completions(service.tokens, prompts, body)
    return await _answer(request, service, generation, shapes, body, headers)


@router.post("/v1/chat/completions", responses=STREAMED)
async def chat(request: Request, body: Chat, service: Here) -> Response:
    """Answers a chat."""
    service.check_model(body.model)
    headers = service.ignored(body)
    prompt, extra, form = await asyncio.to_thread(ask, body, service.tokens, service.engine.ready.context)
    read, contexts = service.checked(prompt.tokens, "messages"), await service.contexts(body)
    beside: dict[str, Any] = {"contexts": contexts, "shared": prompt.shared}
    generation = Generation(service, Chats.kind, [read], body, request.state.key, **beside, **extra)
    shapes = Chats(service.tokens, read, body, form)
    if body.search is not None:
        whole = await unless_gone(request, searched(service, generation, shapes, body))
        return JSONResponse(whole, headers=headers)
    return await _answer(request, service, generation, shapes, body, headers)


async def _answer(
    request: Request,
    service: Service,
    generation: Generation,
    shapes: Completions | Chats,
    body: Completion | Chat,
    headers: Mapping[str, str],
) -> Response:
    if body.stream and generation.sampling.superposes:
        raise ApiError(400, "superposed texts are known at their end: nothing to stream", param="rule")
    pieces = generation.pieces(shapes.shown, shapes.over)
    # Where the client gave no name of its own, the response's is the one that GET /v1/requests/ID/events knows.
    headers = headers if NAME in request.headers else {**headers, NAME: generation.id}
    if not body.stream:
        whole = generation.chosen(await unless_gone(request, gathered(pieces)))
        return JSONResponse(
            head(generation, shapes.whole)
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
    shapes: Completions | Chats,
    usage: bool,
) -> AsyncGenerator[bytes]:
    about = shapes.about([first])
    opened = set()
    async with aclosing(pieces):
        try:
            piece: Piece | None = first
            while piece is not None:
                heading = head(generation, shapes.chunk)
                if piece.choice not in opened:
                    opened.add(piece.choice)
                    opening = shapes.opening(piece.choice)
                    if opening is not None:
                        yield event(heading | {"choices": [opening]} | about)
                        about = {}
                if piece.text or piece.finish or piece.tokens or piece.prompt_logprobs:
                    for delta in shapes.deltas(piece):
                        yield event(heading | {"choices": [delta]})
                piece = await anext(pieces, None)
        except Exception as error:  # whatever it is, the client learns that its answer ends here, and is none
            generation.outcome = "error"
            yield event(told(error)[1])
            return
    if usage:
        heading = head(generation, shapes.chunk)
        yield event(heading | {"choices": [], "usage": generation.usage.record()})
    yield b"data: [DONE]\n\n"
