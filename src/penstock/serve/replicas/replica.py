"""One of several engines with the same model: its process, and the one that comes after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from penstock.core.errors import PenstockError
from penstock.core.events import Event
from penstock.serve.link.client import EngineClient, EngineDiedError
from penstock.serve.messages import ReplicaState, Snapshot
from penstock.serve.replicas.placement import Place

#: Seconds in which deaths are counted.
WINDOW = 3600.0


class Replica:
    """The engine ``number``.

    Args:
        number: counted from 0.
        place: where it computes.
        client: the first one.
        tell: is given what it decided, and whether its state is new.

    Attributes:
        client: the engine's process, also when it has died.
        drained: it was told to take no more requests.
        restarts: how often it was started again.
        lost: why it is not started again; None while it is.
    """

    def __init__(
        self, number: int, place: Place, client: EngineClient, tell: Callable[[Sequence[Event], bool], None]
    ) -> None:
        self.number, self.place, self.drained, self.restarts = number, place, False, 0
        self.lost: EngineDiedError | None = None
        self._tell, self._deaths = tell, list[float]()
        self.put(client)

    def put(self, client: EngineClient) -> None:
        """From now on ``client`` is its engine."""
        self.client = client
        client.watchers.append(self)

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self.client.failure is None and not self.drained

    @property
    def adapters(self) -> dict[str, str]:
        """Those that it has, by name, with what tells them from others."""
        return adapters_of(self.client)

    def answers(self, adapter: str, key: str) -> bool:
        """Whether it takes requests with this ``adapter``, which has the ``key``; it is empty for the model itself."""
        return self.open and (not adapter or self.adapters.get(adapter) == key)

    def state(self, under_way: int) -> ReplicaState:
        """As it is told, with so many continuations ``under_way``."""
        alive = self.client.failure is None
        known = "starting" if self.lost is None else "dead"
        if alive:
            known = "ready" if not self.drained else "draining" if under_way else "drained"
        return ReplicaState(known, under_way, self.restarts, self.client.pid if alive else 0, self.client.snapshot)

    def died_too_often(self, most: int) -> bool:
        """Notes a death: whether there were more than ``most`` within the window."""
        now = time.monotonic()
        self._deaths = [each for each in self._deaths if now - each < WINDOW] + [now]
        return len(self._deaths) > most

    @property
    def deaths(self) -> int:
        """How many were noted within the window."""
        return len(self._deaths)

    def see(self, events: Sequence[Event], snapshot: Snapshot | None) -> None:
        """Passes on what the engine decided; of requests that arrive, with its number."""
        marked = [
            Event(each.time, each.kind, each.id, each.index, {**each.detail, "replica": self.number})
            if each.kind == "arrived"
            else each
            for each in events
        ]
        self._tell(marked, snapshot is not None)


class ReplicaLostError(PenstockError):
    """The replica that had begun to answer a request was lost."""


def adapters_of(client: EngineClient) -> dict[str, str]:
    """The adapters that the engine has, by name, with what tells them from others."""
    return dict(zip(client.snapshot.adapters, client.snapshot.adapter_keys, strict=True))
