"""The engine of a model that writes nothing."""

from __future__ import annotations

from typing import NoReturn

from penstock.core.errors import UsageError
from penstock.core.events import EventLog
from penstock.serve.messages import Delta, Request, Snapshot

#: What whoever wants a text of an encoder is told.
WRITES_NOTHING = "this model makes vectors of texts, or numbers of pairs of them, and writes none"


class EncoderEngine:
    """Stands where an :class:`~penstock.serve.engine.engine.Engine` does, for an encoder, whose texts
    :class:`~penstock.serve.embed.waiting.WaitingTexts` computes.

    Attributes:
        busy: never.
        events: none.
    """

    busy = False

    def __init__(self) -> None:
        self.events = EventLog()

    def add(self, request: Request) -> NoReturn:
        """Refuses a request.

        Raises:
            UsageError: always.
        """
        raise UsageError(WRITES_NOTHING)

    def abort(self, id: str, index: int | None = None) -> None:
        """There is nothing to end."""

    def step(self) -> list[Delta]:
        """Nothing becomes known."""
        return []

    def snapshot(self) -> Snapshot:
        """A state in which nothing happened."""
        return Snapshot(
            steps=0,
            running=0,
            waiting=0,
            blocks=0,
            held=0,
            batch_tokens=0,
            batch_sequences=0,
            prompt_tokens=0,
            cached_tokens=0,
            output_tokens=0,
            drafted_tokens=0,
            accepted_tokens=0,
            preemptions=0,
            step_seconds=0.0,
        )

    def close(self) -> None:
        """There is nothing to end."""
