"""Events as a trace that Perfetto (ui.perfetto.dev) and Chrome open.

The file is a JSON array of Chrome's trace events. The array is closed when the server ends; the format lets it stay
open, and whole events are written at a time, so that what a killed process leaves behind opens too.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from penstock.core.events import Event
from penstock.core.files import explain_os_errors
from penstock.serve.messages import Snapshot
from penstock.serve.observe.words import called, sentence

log = logging.getLogger(__name__)

#: Most bytes of a trace, about a million events.
MOST = 1 << 28

#: Room for what stands at the end.
TAIL = 1 << 10

#: What stands between two events.
BETWEEN = b",\n"

#: What Chrome calls processes: the engine's curves, and the requests.
ENGINE, REQUESTS = 1, 2

#: What a request does from an event on, by the event's kind.
STATES = {"arrived": "waiting", "admitted": "running", "preempted": "preempted"}

#: Events that are shown as a mark.
MARKS = frozenset({"first", "settled", "preempted", "compressed", "forked", "truncated", "fed", "finished"})

_encode = msgspec.json.Encoder().encode


class Trace:
    """Writes what it sees to a file: a track for each continuation, where spans say when it waited, ran, or was out of
    memory, and marks say what else happened; and curves of how many run and wait, and of the blocks held.

    A file that cannot be written any more, or is full, ends the trace and nothing else.

    Args:
        path: of the file, which is written anew.
        most: bytes of it.

    Raises:
        PenstockError: it cannot be opened.
    """

    def __init__(self, path: Path, most: int = MOST) -> None:
        self._path, self._room = path, most - TAIL
        with explain_os_errors(f"cannot write the trace {path}"):
            self._file = path.open("wb", buffering=0)
            names = _name("process", ENGINE, 0, "engine"), _name("process", REQUESTS, 0, "requests")
            self._file.write(b"[\n" + BETWEEN.join(map(_encode, names)))
        self._tracks: dict[tuple[str, int], int] = {}
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def see(self, events: Sequence[Event], snapshot: Snapshot | None) -> None:
        """Writes what happened."""
        if self._file.closed:
            return
        records = [record for event in events for record in self._of(event)]
        if snapshot is not None:
            records += _curves(snapshot)
        self._write(records)

    def _of(self, event: Event) -> list[dict[str, Any]]:
        key, records = (event.id, event.index), []
        if event.kind == "arrived":
            self._count += 1
            self._tracks[key] = self._count
            records.append(_name("thread", REQUESTS, self._count, called(*key)))
        track = self._tracks.get(key)
        if track is None:
            return []
        where = {"pid": REQUESTS, "tid": track, "ts": round(event.time * 1e6)}
        told = {"args": {"what": sentence(event), **event.detail}}
        if event.kind in ("admitted", "preempted", "finished"):
            records.append({"ph": "E", **where})
        if event.kind in STATES:
            records.append({"ph": "B", "name": STATES[event.kind], **where, **told})
        if event.kind in MARKS:
            records.append({"ph": "i", "s": "t", "name": event.kind, **where, **told})
        if event.kind == "finished":
            del self._tracks[key]
        return records

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Appends ``records``, all or none of them; where there is no room, the trace ends."""
        text = b"".join(BETWEEN + _encode(record) for record in records)
        if len(text) <= self._room:
            self._room -= len(text)
            return self._append(text)
        log.warning("the trace %s is full and ends here; the server goes on", self._path)
        full = {"ph": "i", "s": "g", "name": "the trace is full", "pid": ENGINE, "tid": 0, "ts": _now()}
        self._append(BETWEEN + _encode(full))
        self._close()
        return None

    def _append(self, text: bytes) -> None:
        """Writes ``text``, all or nothing of it."""
        place = self._file.tell()
        try:
            if self._file.write(text) < len(text):
                raise OSError("the disk is full")
        except OSError as error:
            log.warning("the trace %s ends here, the server goes on: %s", self._path, error)
            with contextlib.suppress(OSError):
                self._file.truncate(place)
            self._file.close()

    def _close(self) -> None:
        if not self._file.closed:
            self._append(b"\n]\n")
        self._file.close()


def _now() -> int:
    return round(time.time() * 1e6)


def _name(kind: str, process: int, track: int, name: str) -> dict[str, Any]:
    """What a process or thread is called."""
    return {"ph": "M", "name": f"{kind}_name", "pid": process, "tid": track, "args": {"name": name}}


def _curves(now: Snapshot) -> list[dict[str, Any]]:
    """How many sequences run and wait, and how many blocks they hold."""
    values = {"sequences": {"running": now.running, "waiting": now.waiting}, "blocks held": {"held": now.held}}
    return [
        {"ph": "C", "name": name, "pid": ENGINE, "tid": 0, "ts": _now(), "args": value}
        for name, value in values.items()
    ]
