"""Endpoints for operators, and for programs that train what is served here: open where the server was started with
``--control``."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Depends, Response

from penstock.serve.http.endpoints.here import Here
from penstock.serve.http.errors import ApiError
from penstock.serve.http.protocol.operating import Adapter, Weights
from penstock.serve.http.service import Service
from penstock.serve.messages import Act
from penstock.serve.replicas.replicas import Replicas
from penstock.serve.replicas.states import described


async def _open(service: Here) -> None:
    if not service.control:
        raise ApiError(403, "this server is not controlled over HTTP: start it with --control", code="no_control")


router = APIRouter(dependencies=[Depends(_open)])


@router.post("/pause")
async def pause(service: Here) -> dict[str, Any]:
    """Lets requests wait, those under way with all that they have."""
    return await _done(service, Act.PAUSE)


@router.post("/resume")
async def resume(service: Here) -> dict[str, Any]:
    """Lets them go on."""
    return await _done(service, Act.RESUME)


@router.post("/sleep")
async def sleep(service: Here) -> dict[str, Any]:
    """Lets requests wait, and frees the memory of the model and of its cache."""
    return await _done(service, Act.SLEEP)


@router.post("/wake")
async def wake(service: Here) -> dict[str, Any]:
    """Brings both back."""
    return await _done(service, Act.WAKE)


@router.post("/weights")
async def load(body: Weights, service: Here, response: Response) -> dict[str, Any]:
    """Puts other weights in the place of the model's."""
    response.headers.update(service.ignored(body))
    return await _done(service, Act.LOAD, body.folder, body.version)


@router.get("/weights")
async def weights(service: Here) -> dict[str, Any]:
    """The version of the weights, and whether the engine goes on."""
    return _state(service)


@router.post("/adapters")
async def load_adapter(body: Adapter, service: Here, response: Response) -> dict[str, Any]:
    """Loads an adapter, which requests can name from now on."""
    response.headers.update(service.ignored(body))
    if body.name == service.name:
        raise ApiError(400, f"{body.name!r} is what the model is called", param="name")
    await _control(service, Act.LOAD_ADAPTER, body.folder, name=body.name)
    return _adapters(service)


@router.get("/adapters")
async def adapters(service: Here) -> dict[str, Any]:
    """The adapters that requests can name."""
    return _adapters(service)


@router.delete("/adapters/{name:path}")
async def drop_adapter(name: str, service: Here) -> dict[str, Any]:
    """No request can name an adapter any more; those under way go on with it."""
    await _control(service, Act.DROP_ADAPTER, name=name)
    return _adapters(service)


@router.get("/replicas")
async def replicas(service: Here) -> dict[str, Any]:
    """The replicas, and what each is at."""
    return _listed(service)


@router.post("/replicas/{number}/drain")
async def drain(number: int, service: Here) -> dict[str, Any]:
    """Sends a replica no more requests, and waits until those that it has have ended."""
    await _several(service).drain(number)
    return _listed(service)


@router.post("/replicas/{number}/undrain")
async def undrain(number: int, service: Here) -> dict[str, Any]:
    """Sends a replica requests again."""
    _several(service).undrain(number)
    return _listed(service)


def _listed(service: Service) -> dict[str, Any]:
    states = _several(service).snapshot.replicas
    processes = [{"process": each.process or None} for each in states]
    return {"replicas": [each | own for each, own in zip(described(states), processes, strict=True)]}


def _several(service: Service) -> Replicas:
    if not isinstance(service.engine, Replicas):
        raise ApiError(400, "this server has one engine: start it with --replicas N", code="no_replicas")
    return service.engine


async def _done(service: Service, act: Act, folder: str = "", version: int | None = None) -> dict[str, Any]:
    await _control(service, act, folder, version)
    return _state(service)


async def _control(service: Service, act: Act, folder: str = "", version: int | None = None, name: str = "") -> None:
    await service.engine.control(f"ctl-{uuid.uuid4().hex}", act, folder, version, name)


def _adapters(service: Service) -> dict[str, Any]:
    return {"adapters": list(service.engine.snapshot.adapters)}


def _state(service: Service) -> dict[str, Any]:
    now = service.engine.snapshot
    return {"weights_version": now.version, "paused": now.paused, "asleep": now.asleep}
