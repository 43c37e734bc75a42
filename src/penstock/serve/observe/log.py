"""The server's log: a JSON object a line on standard error."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from penstock.core.events import Event
from penstock.serve.messages import Snapshot
from penstock.serve.observe.words import called, sentence

log = logging.getLogger("penstock.events")


class JsonLines(logging.Formatter):
    """Time, level, logger and message of a record, the ``event`` that it is about, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (event := getattr(record, "event", None)) is not None:
            told["event"] = event
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(told).decode()


def start(level: str) -> None:
    """Logs what is of ``level`` (error, warning, info, debug) or graver; at debug, of other libraries info."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level="INFO" if level == "debug" else level.upper(), handlers=[handler], force=True)
    logging.getLogger("penstock").setLevel(level.upper())


class EventLines:
    """Logs each event at debug level."""

    def see(self, events: Sequence[Event], snapshot: Snapshot | None) -> None:
        if log.isEnabledFor(logging.DEBUG):
            for event in events:
                log.debug("%s: %s", called(event.id, event.index), sentence(event), extra={"event": event})
