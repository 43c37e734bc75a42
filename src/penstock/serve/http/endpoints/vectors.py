"""Endpoints for vectors of texts, and for what they say of how near texts are to each other."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from penstock.serve.http.endpoints.here import Here
from penstock.serve.http.names import NAME
from penstock.serve.http.protocol.vectors import Embeddings, OfTexts, Rerank, Scores
from penstock.serve.http.service import Service
from penstock.serve.http.vectors import compared, form_of, made, shortened, usage, written

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: Embeddings, service: Here) -> Response:
    """The vectors of texts."""
    headers, id = _begun(service, body, "embd-")
    form = form_of(service)
    shortened(np.zeros((1, form.size), np.float32), body.dimensions, form)  # refused before it is computed
    found = await made(
        request, service, id, body.texts(), "input", body.truncate_prompt_tokens, body.add_special_tokens
    )
    vectors = shortened(found.vectors, body.dimensions, form)
    data = [
        {"object": "embedding", "index": place, "embedding": written(vector, body.encoding_format)}
        for place, vector in enumerate(vectors)
    ]
    return _answer(request, service, id, headers, object="list", data=data, usage=usage(found.tokens))


@router.post("/v1/score")
@router.post("/score", include_in_schema=False)
async def score(request: Request, body: Scores, service: Here) -> Response:
    """How near texts are to each other, pair by pair: what a model of pairs says, or the cosines of their vectors."""
    headers, id = _begun(service, body, "score-")
    one, other = body.sides()
    found = await compared(request, service, id, one, other, "text_2", body)
    data = [{"object": "score", "index": place, "score": value} for place, value in enumerate(found.scores.tolist())]
    return _answer(request, service, id, headers, object="list", data=data, usage=usage(found.tokens))


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def rerank(request: Request, body: Rerank, service: Here) -> Response:
    """The documents that are nearest to a query, the nearest first: by what a model of pairs says, or by the cosines of
    their vectors."""
    headers, id = _begun(service, body, "rerank-")
    documents = body.texts()
    found = await compared(request, service, id, [body.query], documents, "documents", body)
    order = np.argsort(-found.scores, kind="stable")[: body.top_n].tolist()
    results: list[dict[str, Any]] = [
        {"index": place, "relevance_score": float(found.scores[place])}
        | ({"document": {"text": documents[place]}} if body.return_documents else {})
        for place in order
    ]
    return _answer(request, service, id, headers, results=results, usage=usage(found.tokens))


def _begun(service: Service, body: OfTexts, kind: str) -> tuple[dict[str, str], str]:
    """The headers of the answer, and its name."""
    service.check_alone(body.model, "vectors")
    return service.ignored(body), f"{kind}{uuid.uuid4().hex}"


def _answer(request: Request, service: Service, id: str, headers: dict[str, str], **fields: Any) -> Response:
    headers = headers if NAME in request.headers else {**headers, NAME: id}
    record: dict[str, Any] = {
        "id": id,
        "created": int(time.time()),
        "model": service.name,
        "weights_version": service.engine.snapshot.version,
    }
    return Response(msgspec.json.encode(record | fields), media_type="application/json", headers=headers)
