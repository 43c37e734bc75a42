"""Anthropic's endpoint for messages."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from penstock.serve.http.chats import ask
from penstock.serve.http.endpoints.blocks import answer, begun
from penstock.serve.http.endpoints.here import WRITES, Here
from penstock.serve.http.protocol.messages import Conversation, CreateMessage
from penstock.serve.http.shapes.blocks import Blocks
from penstock.serve.http.shapes.messages import Messages
from penstock.serve.http.streams import STREAMED

router = APIRouter(dependencies=[WRITES])


@router.post("/v1/messages", responses=STREAMED)
async def message(request: Request, body: CreateMessage, service: Here) -> Response:
    """Answers a conversation, as Anthropic's clients say it."""
    service.check_model(body.model)
    headers = service.ignored(body)
    generation, form = await begun(service, body.chat(), Messages.kind, "messages", request.state.key)
    blocks = Blocks(form, service.tokens, body.skip_special_tokens is False)
    return await answer(request, generation, blocks, Messages(blocks, generation.model), body.stream, headers)


@router.post("/v1/messages/count_tokens")
async def count(body: Conversation, service: Here, response: Response) -> dict[str, int]:
    """How many tokens a conversation has, as the model would read it."""
    service.check_model(body.model)
    response.headers.update(service.ignored(body))
    prompt, _, _ = await asyncio.to_thread(ask, body.chat(), service.tokens, service.engine.ready.context)
    return {"input_tokens": len(prompt.tokens)}
