"""Messages between two processes of a host, each of which has an end of a socket pair.

A frame is its length (four bytes, big-endian) and a message.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

HEADER = struct.Struct(">I")

#: Seconds that the step may take in which the other process leaves.
LAST_STEP = 2.0


M = TypeVar("M")


def framed(body: bytes) -> bytes:
    """``body`` with its length before it."""
    return HEADER.pack(len(body)) + body


def length(header: bytes) -> int:
    """How many bytes follow ``header``."""
    size: int = HEADER.unpack(header)[0]
    return size


class Channel(Generic[M]):
    """This process's end of a socket pair.

    Args:
        connection: the end.
        encode, decode: between a message and its bytes.
    """

    def __init__(self, connection: socket.socket, encode: Callable[[M], bytes], decode: Callable[[bytes], M]) -> None:
        self._connection, self._encode, self._decode = connection, encode, decode
        self._file = connection.makefile("rb")
        self._inbox: SimpleQueue[M | None] = SimpleQueue()
        self._sending = threading.Lock()

    def receive(self) -> M | None:
        """The next message, waited for; None once the other end is closed."""
        with contextlib.suppress(ConnectionError):
            header = self._file.read(HEADER.size)
            body = self._file.read(length(header)) if len(header) == HEADER.size else b""
            return self._decode(body) if body else None
        return None

    def send(self, message: M) -> None:
        """Sends ``message``; any thread may."""
        with contextlib.suppress(ConnectionError), self._sending:  # whoever receives notices the end
            self._connection.sendall(framed(self._encode(message)))

    def close(self) -> None:
        """Closes this end, which tells the other one."""
        self._file.close()
        self._connection.close()

    def listen(self) -> None:
        """From now on messages gather by themselves: :meth:`pending` has them. A thread reads, so that the end of the
        other process is noticed in the midst of a long step."""
        threading.Thread(target=self._gather, daemon=True).start()

    def _gather(self) -> None:
        while (message := self.receive()) is not None:
            self._inbox.put(message)
        self._inbox.put(None)
        time.sleep(LAST_STEP)
        os._exit(0)

    def pending(self, wait: bool, most: float | None = None) -> list[M | None]:
        """What has come since the last call; with ``wait``, at least one message, unless none comes in ``most``
        seconds. None is the other end's end."""
        messages: list[M | None] = []
        if wait:
            with contextlib.suppress(Empty):
                messages.append(self._inbox.get(timeout=most))
        while True:
            try:
                messages.append(self._inbox.get_nowait())
            except Empty:
                return messages
