"""The server's application in this process, with an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx

from penstock.models import hub
from penstock.serve.http.app import make_app
from penstock.serve.http.service import Limits, Service
from penstock.serve.http.text import Tokens
from penstock.serve.messages import Delta, Finish, Request


class Engine:
    """Says ``tokens``, one at a time, in place of an engine; keeps the requests."""

    ready = SimpleNamespace(sequences=8, context=2048, vocabulary=4096, memory={})
    failure = None
    outstanding = 0

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self.watchers: list[Any] = []
        self.requests: list[Request] = []
        self.aborted: list[str] = []

    async def stream(self, *requests: Request) -> AsyncIterator[Delta]:
        self.requests += requests
        for request in requests:
            for place, token in enumerate(self._tokens, start=1):
                yield Delta(request.id, 0, [token], finish=Finish.LENGTH if place == len(self._tokens) else None)

    def abort(self, id: str, index: int | None = None) -> None:
        self.aborted.append(id)


@functools.cache
def tokens() -> Tokens:
    return Tokens(hub.load_tokenizer("python-1m"))


def asked(
    path: str, *, strict: bool = False, engine: Engine | None = None, tokenizer: Tokens | None = None, **request: Any
) -> httpx.Response:
    """What the application answers to a request by POST."""
    service = Service("m", tokenizer or tokens(), engine or Engine([300]), Limits(), strict)

    async def posted() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service, [], False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, **request)

    return asyncio.run(posted())
