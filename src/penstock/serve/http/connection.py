"""A client's connection: what HTTP itself can get wrong, and how long and how many may wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http
import json
import logging
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.serve.http.errors import ApiError, content

#: Descriptors that connections leave to files that the server reads, and to connections that are about to be refused.
SPARE = 32

#: Connections where the system sets no limit.
ENOUGH = 2**16

#: What ``accept`` fails with when there is no room for another connection.
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Seldom:
    """Warns at most once a second, and says how often it did not."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._last, self._unsaid = log, -1.0, 0

    def warn(self, message: str) -> None:
        now = time.monotonic()
        if now - self._last < 1:
            self._unsaid += 1
            return
        before = f" ({self._unsaid} times more since the last of these lines)" if self._unsaid else ""
        self._log.warning("%s%s", message, before)
        self._last, self._unsaid = now, 0


crowded = Seldom(logging.getLogger(__name__))


class Connection(H11Protocol):
    """Answers in OpenAI's shape what is no HTTP, closes a connection whose client says nothing, and refuses those for
    which there are no file descriptors.

    Attributes:
        reading: seconds for a request's head, and for each part of its body to come.
        most: connections at a time.
    """

    reading: ClassVar[float]
    most: ClassVar[int]

    _late: asyncio.TimerHandle | None = None
    _said_something = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            crowded.warn(
                f"{self.most} connections are open, as many as the limit of open files (ulimit -n) leaves room for; "
                "more are refused"
            )
            self._refuse(503, "the server has as many connections as it can; try again later")
        else:
            self._wait_for_client()

    def data_received(self, data: bytes) -> None:
        self._said_something = True
        super().data_received(data)
        self._wait_for_client()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        # The library shows what it found as Python writes bytes.
        said = re.sub(r"bytearray\(b(.*)\)", r"\1", str(error or msg))
        self._refuse(status, f"this is not a request in HTTP/1.1: {said[:200]}")

    def _unsupported_upgrade_warning(self) -> None:
        """A request for another protocol is answered as if it had asked for none, as it should be."""

    def _wait_for_client(self) -> None:
        """Sets the time by which the client must have said more, if it is its turn."""
        inside = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing() or (inside and not self.cycle.more_body):
            self._stop_waiting()
        elif inside or self._late is None:  # a head has its time as a whole, a body for each part
            self._stop_waiting()
            self._late = self.loop.call_later(self.reading, self._give_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self._said_something:
            self._refuse(408, f"the request did not come to its end within {self.reading:g} seconds")
        else:
            self.transport.close()

    def _refuse(self, status: int, what: str) -> None:
        """Answers with an error where an answer can still begin, and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(content(ApiError(status, what))[1]).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers, reason=http.HTTPStatus(status).phrase.encode()),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def room() -> int:
    """How many connections the process can have open at a time, by its limit of open files, which is set as high as it
    may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    free = (ENOUGH if soft == resource.RLIM_INFINITY else soft) - len(list(Path("/dev/fd").iterdir()))
    return max(1, free - min(SPARE, free // 4))


def quietly(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's handler of exceptions, for which a server that cannot accept connections is no flood of news."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in FULL and "accept" in context.get("message", ""):
        crowded.warn(f"new connections have to wait: {error.strerror}; the limit of open files is set by ulimit -n")
    else:
        loop.default_exception_handler(context)
