"""The server's application in this process, with an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from penstock.models import hub
from penstock.serve.http.app import make_app
from penstock.serve.http.service import Limits, Service
from penstock.serve.http.text import Tokens
from penstock.serve.link.wire import Ready
from penstock.serve.messages import Delta, Finish, Request, Snapshot


class Engine:
    """Says ``tokens``, one at a time, in place of an engine, and ends for the reason ``finish``; keeps the requests."""

    ready = Ready(2048, 8, 4096, [], "plain")
    snapshot = Snapshot(*[0] * 13, 0.0)
    failure = None
    outstanding = 0

    def __init__(self, tokens: Sequence[int], finish: Finish = Finish.LENGTH) -> None:
        self._tokens, self._finish = tokens, finish
        self.watchers: list[Any] = []
        self.requests: list[Request] = []
        self.aborted: list[str] = []

    async def stream(self, *requests: Request) -> AsyncIterator[Delta]:
        self.requests += requests
        for request in requests:
            for place, token in enumerate(self._tokens, start=1):
                yield Delta(request.id, 0, [token], finish=self._finish if place == len(self._tokens) else None)

    def abort(self, id: str, index: int | None = None) -> None:
        self.aborted.append(id)


@functools.cache
def tokens() -> Tokens:
    return Tokens(hub.load_tokenizer("python-1m"))


#: As Qwen3's, in short.
TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    '{% endfor %}{{ "\\n" }}'
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}{% if enable_thinking %}<think>\n{% endif %}"
)


@functools.cache
def tokens_with_tools() -> Tokens:
    """Of a model whose template knows of functions and thoughts."""
    tokenizer = hub.load_tokenizer("python-1m")
    tokenizer.chat_template = TEMPLATE
    return Tokens(tokenizer)


def saying(*texts: str, finish: Finish = Finish.STOP) -> Engine:
    """An engine that says ``texts``, a token at a time, and then ends its text."""
    spoken = tokens_with_tools().encode("".join(texts), False)
    return Engine([*spoken, 0] if finish is Finish.STOP else spoken, finish)


def serving(engine: Engine, strict: bool = False) -> Service:
    """A service with such a model."""
    return Service("m", tokens_with_tools(), engine, Limits(), strict)  # type: ignore[arg-type]


def asked(
    path: str,
    *,
    strict: bool = False,
    engine: Any = None,
    tokenizer: Tokens | None = None,
    deadline: float = 600.0,
    **request: Any,
) -> httpx.Response:
    """What the application answers to a request by POST."""
    limits = Limits(deadline=deadline)
    service = Service("m", tokenizer or tokens(), engine or Engine([300]), limits, strict)

    async def posted() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service, [], False))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, **request)

    return asyncio.run(posted())
