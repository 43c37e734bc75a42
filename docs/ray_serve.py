"""Penstock on a Ray cluster: engines on the devices of several machines, behind Ray Serve.

Every replica of the deployment is an engine in a process of its own, with Penstock's HTTP interface in front of it. Ray
places replicas, starts those again that die, and sends each request to one of them. Settings are variables of the
environment:

    pip install 'penstock[ray]'
    PENSTOCK_MODEL=Qwen/Qwen3-8B PENSTOCK_REPLICAS=8 PENSTOCK_GPUS=1 serve run ray_serve:app

PENSTOCK_GPUS is the number of GPUs of a replica, which divide the model; 0 is for a try on CPUs. PENSTOCK_API_KEY is
the key that clients need; without it, everybody who can reach Ray Serve's port may ask.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve

from penstock.models import hub
from penstock.serve.config import EngineConfig
from penstock.serve.http.app import make_app
from penstock.serve.http.service import Limits, Service
from penstock.serve.http.text import Tokens
from penstock.serve.link.client import EngineClient


@serve.deployment(max_ongoing_requests=1024, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Penstock:
    """An engine with its HTTP interface.

    Args:
        model: whatever ``penstock serve`` takes.
        gpus: of this replica, which divide the model; 0 computes on the CPU.
        key: that clients need; None lets everybody in.
    """

    async def __init__(self, model: str, gpus: int, key: str | None) -> None:
        folder, config = hub.resolve(model), EngineConfig(tensor_parallel=max(1, gpus))
        self._engine = await EngineClient.open(str(folder), config, "cuda" if gpus else "cpu")
        tokens = Tokens(hub.load_tokenizer(folder))
        service = Service(hub.name_of(model), tokens, self._engine, Limits())
        self._app = make_app(service, [key] if key else [], local=False)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve gives requests to; it asks when the replica has been made."""
        return self._app

    async def check_health(self) -> None:
        """Ray starts the replica again where this raises: its engine is dead."""
        if self._engine.failure is not None:
            raise self._engine.failure

    async def __del__(self) -> None:
        """The engine ends with its replica; where that is killed, by itself."""
        await self._engine.close()


def deployed(model: str, replicas: int, gpus: int, key: str | None = None) -> Any:
    """The application for ``serve.run``: so many replicas with ``gpus`` each."""
    options = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
    return Penstock.options(num_replicas=replicas, ray_actor_options=options).bind(model, gpus, key)


app = deployed(
    os.environ.get("PENSTOCK_MODEL", "python-6m"),
    int(os.environ.get("PENSTOCK_REPLICAS", "1")),
    int(os.environ.get("PENSTOCK_GPUS", "0")),
    os.environ.get("PENSTOCK_API_KEY"),
)
