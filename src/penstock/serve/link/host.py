"""An engine and those who live in its process, to do what takes many requests."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol

from penstock.serve.engine.engine import Engine
from penstock.serve.link.wire import Done, Errand
from penstock.serve.messages import Abort, Delta, Request


class Guest(Protocol):
    """Does errands over the engine, in its process and its thread. A module has one under the name ``guest``: a
    function of the engine and of the model that it has loaded."""

    @property
    def busy(self) -> bool:
        """Whether there are errands."""
        ...

    def begin(self, request: Request, work: str) -> None:
        """Takes on an errand.

        Raises:
            PenstockError: it cannot be done.
        """
        ...

    def end(self, id: str) -> None:
        """The errand ``id`` is over, with what there is of it; an unknown one is ignored."""
        ...

    def take(self, deltas: Sequence[Delta]) -> tuple[list[Delta], list[Done]]:
        """Goes on with what a step of the engine made known, if there was anything to do, and else after a moment: the
        ``deltas`` of others, and errands that are done."""
        ...


class Host:
    """The engine of this process, and those who do errands over it.

    Args:
        engine: of this process.
        model: that it has loaded.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine, self._model = engine, model
        self._guests: dict[str, Guest] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return self.engine.busy or any(guest.busy for guest in self._guests.values())

    def take(self, message: Request | Errand | Abort) -> None:
        """Takes in a request, begins an errand, or ends one of both.

        Raises:
            PenstockError: it cannot be taken in.
        """
        if isinstance(message, Request):
            self.engine.add(message)
        elif isinstance(message, Errand):
            if message.guest not in self._guests:
                made = importlib.import_module(message.guest).guest(self.engine, self._model)
                self._guests[message.guest] = made
            self._guests[message.guest].begin(message.request, message.work)
        else:
            self.engine.abort(message.id, message.index)
            for guest in self._guests.values():
                guest.end(message.id)

    def step(self) -> tuple[list[Delta], list[Done]]:
        """What a step makes known, and errands that are done."""
        deltas, done = self.engine.step() if self.engine.busy else [], list[Done]()
        for guest in self._guests.values():
            deltas, own = guest.take(deltas)
            done += own
        return deltas, done
