"""Answers in blocks: whole, and as events that have names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from penstock.serve.http.chats import Form, ask
from penstock.serve.http.errors import told
from penstock.serve.http.names import NAME
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.service import Generation, Piece, Service
from penstock.serve.http.shapes.blocks import Blocks
from penstock.serve.http.shapes.messages import Messages
from penstock.serve.http.shapes.responses import Responses
from penstock.serve.http.streams import EventStream, event, gathered, unless_gone


async def begun(service: Service, chat: Chat, kind: str, param: str, key: str) -> tuple[Generation, Form]:
    """The answer to ``chat`` in the making, and how it is read; ``param`` is the field that its messages come from."""
    prompt, extra, form = await asyncio.to_thread(ask, chat, service.tokens, service.engine.ready.context)
    return Generation(service, kind, [service.checked(prompt.tokens, param)], chat, key, **extra), form


async def answer(
    request: Request,
    generation: Generation,
    blocks: Blocks,
    shape: Responses | Messages,
    stream: bool,
    headers: Mapping[str, str],
    done: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Response:
    """The response to ``request``, in the given shape; ``done`` is told of the whole answer."""
    pieces = generation.pieces(blocks.shown, blocks.over)
    headers = headers if NAME in request.headers else {**headers, NAME: generation.id}
    if not stream:
        for piece in await unless_gone(request, gathered(pieces)):
            for _ in shape.more(piece):
                pass
        record = shape.record(generation)
        done(record)
        return JSONResponse(record, headers=headers)
    # The first piece is waited for, so that a request that is refused gets a status that says so.
    first = await unless_gone(request, anext(pieces))
    return EventStream(_events(generation, first, pieces, shape, done), headers)


async def _events(
    generation: Generation,
    first: Piece,
    pieces: AsyncGenerator[Piece],
    shape: Responses | Messages,
    done: Callable[[dict[str, Any]], None],
) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        try:
            for each in shape.begin(generation):
                yield event(each, each["type"])
            piece: Piece | None = first
            while piece is not None:
                for each in shape.more(piece):
                    yield event(each, each["type"])
                piece = await anext(pieces, None)
            done(shape.record(generation))
            for each in shape.end(generation):
                yield event(each, each["type"])
        except Exception as error:  # whatever it is, the client learns that its answer ends here, and is none
            generation.outcome = "error"
            failure = shape.failed(told(error)[1])
            yield event(failure, failure["type"])
