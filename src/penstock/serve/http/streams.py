"""Answers that come as they are made, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

from penstock.serve.http.errors import ApiError

R = TypeVar("R")

#: What the description of an endpoint says of a stream.
STREAMED: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}}}


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


def event(value: Any, name: str | None = None) -> bytes:
    """``value`` as a server-sent event, of this ``name`` where it has one."""
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + msgspec.json.encode(value) + b"\n\n"


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


async def gathered(pieces: AsyncIterable[R]) -> list[R]:
    """All of ``pieces``."""
    return [piece async for piece in pieces]
