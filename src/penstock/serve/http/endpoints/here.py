"""What endpoints are given."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from penstock.serve.embed.encoder_engine import WRITES_NOTHING
from penstock.serve.http.errors import ApiError
from penstock.serve.http.service import Service


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


#: The service of the application.
Here = Annotated[Service, Depends(_service)]


async def _writes(service: Here) -> None:
    if not service.engine.ready.writes:
        raise ApiError(400, f"{WRITES_NOTHING}: ask /v1/embeddings, /v1/score or /v1/rerank", param="model")


#: Of endpoints that need a model which writes.
WRITES = Depends(_writes)
