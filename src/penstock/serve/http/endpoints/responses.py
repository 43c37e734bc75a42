"""OpenAI's endpoint for responses."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from penstock.serve.http.endpoints.blocks import answer, begun
from penstock.serve.http.endpoints.here import WRITES, Here
from penstock.serve.http.protocol.responses import Respond
from penstock.serve.http.shapes.blocks import Blocks
from penstock.serve.http.shapes.responses import Responses
from penstock.serve.http.streams import STREAMED

router = APIRouter(dependencies=[WRITES])


@router.post("/v1/responses", responses=STREAMED)
async def respond(request: Request, body: Respond, service: Here) -> Response:
    """Answers a conversation, or goes on with one that is kept."""
    service.check_model(body.model)
    headers, key, kept = service.ignored(body), request.state.key, service.conversations
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        before = kept.find(key, body.previous_response_id, "previous_response_id").messages
    generation, form = await begun(service, body.chat(before), Responses.kind, "input", key)
    blocks = Blocks(form, service.tokens, body.skip_special_tokens is False)
    shape = Responses(service.tokens, body, blocks, generation.model)

    def keep(record: dict[str, Any]) -> None:
        if body.kept:
            kept.keep(key, record, before, [*body.messages(), blocks.message()])

    return await answer(request, generation, blocks, shape, body.stream, headers, keep)


@router.get("/v1/responses/{id}")
async def response(id: str, request: Request, service: Here) -> dict[str, Any]:
    """A response that is kept."""
    return service.conversations.find(request.state.key, id).record


@router.delete("/v1/responses/{id}")
async def forget(id: str, request: Request, service: Here) -> dict[str, Any]:
    """Forgets a response."""
    service.conversations.forget(request.state.key, id)
    return {"id": id, "object": "response", "deleted": True}
