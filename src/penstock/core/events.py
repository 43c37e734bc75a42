"""What happened to whom, and when: a bounded record that can be asked and passed on."""

from __future__ import annotations

import dataclasses
import time
from collections import deque

#: What an event may say besides its kind.
Detail = dict[str, int | float | str]

#: How many events are kept.
KEPT = 20_000


@dataclasses.dataclass(frozen=True)
class Event:
    """One decision.

    Attributes:
        time: seconds since the epoch.
        kind: what was decided, in one word.
        id: about which request.
        index: about which of its continuations.
        detail: what else there is to say.
    """

    time: float
    kind: str
    id: str
    index: int
    detail: Detail


class EventLog:
    """The newest events, in order."""

    def __init__(self, kept: int = KEPT) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._fresh: list[Event] = []
        self._most = kept

    def add(self, kind: str, id: str, index: int, /, **detail: int | float | str) -> None:
        """Something of ``kind`` was decided about the continuation ``index`` of the request ``id``."""
        event = Event(time.time(), kind, id, index, detail)
        self._events.append(event)
        self._fresh.append(event)
        if len(self._fresh) > self._most:  # nobody asks
            del self._fresh[: self._most // 2]

    def of(self, id: str) -> list[Event]:
        """Everything that is still known of the request ``id``."""
        return [event for event in self._events if event.id == id]

    def fresh(self) -> list[Event]:
        """What was added since the last call."""
        told, self._fresh = self._fresh, []
        return told
