"""The engine in a process of its own.

The process that starts it keeps the other end of a socket pair, and nobody else can have it. When that end closes,
for whatever reason, this process ends after the step that it is in, and after some seconds whatever it does: no engine
outlives its front end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time

from penstock.core.channel import Channel
from penstock.core.errors import PenstockError
from penstock.core.garbage import settle
from penstock.core.progress import show
from penstock.serve.build import open_engine
from penstock.serve.config import EngineConfig
from penstock.serve.link.host import Host
from penstock.serve.link.wire import Errand, Failed, Message, News, Open, Ready, Refused, body, parse
from penstock.serve.messages import Abort, Request
from penstock.serve.ranks.group import RankLostError
from penstock.serve.ranks.runner import LeadingRunner

log = logging.getLogger(__name__)

#: Seconds between two snapshots of a busy engine.
SNAPSHOTS = 0.1


def serve(host: Host, channel: Channel[Message]) -> None:
    """Steps the engine while it has anything to do, and takes messages in between, until the other end closes."""
    engine, told = host.engine, 0.0
    while True:
        for message in channel.pending(wait=not host.busy):
            if message is None:
                engine.close()
                return
            _take(host, message, channel)
        deltas, done = host.step()
        now = time.monotonic()
        snapshot = None
        if now - told >= SNAPSHOTS or not host.busy:
            snapshot, told = engine.snapshot(), now
        if deltas or snapshot is not None:
            channel.send(News(deltas, snapshot, engine.events.fresh()))
        for each in done:
            channel.send(each)


def _take(host: Host, message: Message, channel: Channel[Message]) -> None:
    assert isinstance(message, Request | Errand | Abort)
    id = message.request.id if isinstance(message, Errand) else message.id
    try:
        host.take(message)
    except PenstockError as error:
        channel.send(Refused(id, str(error)))
    except Exception as error:  # nobody foresaw it; other requests go on
        log.exception("the request %s cannot be taken in", id)
        host.engine.abort(id)
        channel.send(Refused(id, f"{type(error).__name__}: {error}", defect=True))


def main() -> None:
    """What the process runs: its argument is the file descriptor of its end of the socket pair."""
    # Ctrl-C and SIGTERM reach the whole group; the front end decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), body, parse)
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
    limits, executor = engine.limits, engine.executor
    memory = [dict(executor.memory)]
    if isinstance(executor, LeadingRunner) and executor.ranks is not None:
        memory += executor.ranks.memory
        executor.ranks.watch(lambda error: _end(error, channel))
    channel.send(Ready(engine.context, limits.sequences, limits.model.vocabulary, memory, config.codec.policy_name))
    channel.send(News([], engine.snapshot()))
    try:
        serve(Host(engine, wanted.model), channel)
    except RankLostError as error:
        _end(error, channel)


def _end(error: PenstockError, channel: Channel[Message]) -> None:
    """Says why the engine ends, and ends this process, from whichever thread: another may wait for a lost rank."""
    channel.send(Failed(error.what, error.hint, error.exit_code))
    os._exit(error.exit_code)


if __name__ == "__main__":
    main()
