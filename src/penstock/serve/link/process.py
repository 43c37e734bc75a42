"""The engine in a process of its own.

The process that starts it keeps the other end of a socket pair, and nobody else can have it. When that end closes,
for whatever reason, this process ends after the step that it is in, and after some seconds whatever it does: no engine
outlives its front end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from queue import Empty, SimpleQueue

from penstock.core.errors import PenstockError
from penstock.core.garbage import settle
from penstock.core.progress import show
from penstock.serve.build import open_engine
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.link.wire import HEADER, Failed, Message, News, Open, Ready, Refused, frame, length, parse
from penstock.serve.messages import Abort, Request

log = logging.getLogger(__name__)

#: Seconds between two snapshots of a busy engine.
SNAPSHOTS = 0.1

#: Seconds that the step may take in which the front end leaves.
LAST_STEP = 2.0


class Channel:
    """This process's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()

    def receive(self) -> Message | None:
        """The next message, waited for; None once the other end is closed."""
        with contextlib.suppress(ConnectionError):
            header = self._file.read(HEADER.size)
            body = self._file.read(length(header)) if len(header) == HEADER.size else b""
            return parse(body) if body else None
        return None

    def send(self, message: Message) -> None:
        with contextlib.suppress(ConnectionError):  # whoever receives notices the end
            self._connection.sendall(frame(message))

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

    def pending(self, wait: bool) -> list[Message | None]:
        """What has come since the last call; with ``wait``, at least one message. None is the other end's end."""
        messages = [self._inbox.get()] if wait else []
        while True:
            try:
                messages.append(self._inbox.get_nowait())
            except Empty:
                return messages


def serve(engine: Engine, channel: Channel) -> None:
    """Steps ``engine`` while it has anything to do, and takes messages in between, until the other end closes."""
    told = 0.0
    while True:
        for message in channel.pending(wait=not engine.busy):
            if message is None:
                engine.close()
                return
            _take(engine, message, channel)
        deltas = engine.step()
        now = time.monotonic()
        snapshot = None
        if now - told >= SNAPSHOTS or not engine.busy:
            snapshot, told = engine.snapshot(), now
        if deltas or snapshot is not None:
            channel.send(News(deltas, snapshot, engine.events.fresh()))


def _take(engine: Engine, message: Message, channel: Channel) -> None:
    if isinstance(message, Abort):
        engine.abort(message.id, message.index)
    elif isinstance(message, Request):
        try:
            engine.add(message)
        except PenstockError as error:
            channel.send(Refused(message.id, str(error)))
        except Exception as error:  # nobody foresaw it; other requests go on
            log.exception("the request %s cannot be taken in", message.id)
            engine.abort(message.id)
            channel.send(Refused(message.id, f"{type(error).__name__}: {error}", defect=True))


def main() -> None:
    """What the process runs: its argument is the file descriptor of its end of the socket pair."""
    # Ctrl-C and SIGTERM reach the whole group; the front end decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    wanted = channel.receive()
    if wanted is None:
        return
    assert isinstance(wanted, Open)
    channel.listen()
    config = EngineConfig.model_validate_json(wanted.config)
    try:
        engine = open_engine(wanted.model, config, wanted.device, show)
    except PenstockError as error:
        channel.send(Failed(error.what, error.hint, error.exit_code))
        return
    settle()
    limits, memory = engine.limits, dict(engine.executor.memory)
    channel.send(Ready(engine.context, limits.sequences, limits.model.vocabulary, memory, config.codec.policy_name))
    channel.send(News([], engine.snapshot()))
    serve(engine, channel)


if __name__ == "__main__":
    main()
