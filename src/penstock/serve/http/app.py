"""The application: its endpoints, and what stands before them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI

from penstock import __version__
from penstock.serve.http import errors
from penstock.serve.http.endpoints import about, messages, operating, responses, texts, vectors
from penstock.serve.http.guard import Guard
from penstock.serve.http.names import RequestNames
from penstock.serve.http.service import Service

#: What any endpoint may answer.
FAULTS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault."},
    "5XX": {"description": "We are."},
}


def make_app(service: Service, keys: Collection[str], local: bool) -> FastAPI:
    """The application. ``keys`` and ``local`` are :class:`~penstock.serve.http.guard.Guard`'s."""
    app = FastAPI(title="Penstock", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    for part in (texts, responses, messages, vectors, operating, about):
        app.include_router(part.router, responses=FAULTS)
    app.add_middleware(Guard, keys=keys, local=local, body=round(service.limits.body * 2**20))
    errors.install(app)
    app.add_middleware(RequestNames)
    return app
