"""An engine and those who live in its process, to do what takes many requests."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Sequence
from typing import Protocol

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.serve.embed.encoder_engine import WRITES_NOTHING, EncoderEngine
from penstock.serve.embed.waiting import WaitingTexts
from penstock.serve.engine.engine import Engine
from penstock.serve.link.wire import Done, Errand
from penstock.serve.messages import Abort, Act, Control, Delta, Embed, Request, Snapshot, Vectors

log = logging.getLogger(__name__)


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
        engine: of this process; an encoder's writes nothing.
        model: that it has loaded.
        texts: makes vectors; None where the model makes none.
    """

    def __init__(self, engine: Engine | EncoderEngine, model: str, texts: WaitingTexts | None = None) -> None:
        self.engine, self._model, self._texts = engine, model, texts
        self._guests: dict[str, Guest] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        others = any(guest.busy for guest in self._guests.values()) or (self._texts is not None and self._texts.busy)
        return self.engine.busy or (others and not self._stopped)

    @property
    def due(self) -> float | None:
        """Seconds until the next request passes its deadline, also while the engine is stopped; None without any."""
        return None if isinstance(self.engine, EncoderEngine) else self.engine.requests.due

    @property
    def _stopped(self) -> bool:
        return not isinstance(self.engine, EncoderEngine) and self.engine.control.stopped

    def snapshot(self) -> Snapshot:
        """The state now."""
        now = self.engine.snapshot()
        if self._texts is None:
            return now
        return dataclasses.replace(now, embedded_texts=self._texts.texts, embedded_tokens=self._texts.tokens)

    def take(self, message: Request | Errand | Embed | Control | Abort) -> None:
        """Takes in a request, begins an errand, ends one of both, or does what an operator wants.

        Raises:
            PenstockError: it cannot be taken in.
        """
        if isinstance(message, Request):
            self.engine.add(message)
        elif isinstance(message, Embed):
            if self._texts is None:
                raise UsageError("an engine that records its steps, or is divided among ranks, makes no vectors")
            self._texts.add(message)
        elif isinstance(message, Abort):
            self._abort(message)
        elif isinstance(self.engine, EncoderEngine):
            raise UsageError(WRITES_NOTHING)
        elif isinstance(message, Control):
            _control(self.engine, message)
        else:
            if message.guest not in self._guests:
                made = importlib.import_module(message.guest).guest(self.engine, self._model)
                self._guests[message.guest] = made
            self._guests[message.guest].begin(message.request, message.work)

    def _abort(self, message: Abort) -> None:
        self.engine.abort(message.id, message.index)
        if self._texts is not None:
            self._texts.abort(message.id)
        for guest in self._guests.values():
            guest.end(message.id)

    def step(self) -> tuple[list[Delta], list[Done | Vectors]]:
        """What a step makes known, errands that are done, and vectors: a step and a pass of texts take turns."""
        # A stopped engine has requests whose deadlines pass.
        deltas = self.engine.step() if self.engine.busy or self._stopped else []
        done: list[Done | Vectors] = []
        if deltas or not self._stopped:
            for guest in self._guests.values():
                deltas, own = guest.take(deltas)
                done += own
        if self._texts is not None and not self._stopped:
            done += self._texts.step()
        return deltas, done


def _control(engine: Engine, wanted: Control) -> None:
    match wanted.act:
        case Act.PAUSE:
            engine.control.pause()
        case Act.RESUME:
            engine.control.resume()
        case Act.SLEEP:
            engine.control.sleep()
        case Act.WAKE:
            engine.control.wake()
        case Act.LOAD:
            engine.control.load(hub.resolve(wanted.folder), wanted.version)
        case Act.LOAD_ADAPTER:
            engine.adapters.load(wanted.name, wanted.folder)
        case Act.DROP_ADAPTER:
            engine.adapters.drop(wanted.name)
    done = " ".join(filter(None, (wanted.act.value, wanted.name)))
    log.warning("%s: done; the weights' version is %d", done, engine.control.version)
