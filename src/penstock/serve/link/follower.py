"""A rank beside the first one, in a process of its own, which does what the first one tells it.

As with the process of an engine, the first rank keeps the other end of a socket pair: when that closes, this process
ends after the step that it is in, and after some seconds whatever it does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from penstock.core.channel import Channel
from penstock.core.errors import PenstockError
from penstock.core.garbage import settle
from penstock.models.decoder import Decoder
from penstock.models.shares import Share
from penstock.ops.paged.contract import StepShape
from penstock.parallel.world import World
from penstock.serve.build import build_following
from penstock.serve.config import EngineConfig
from penstock.serve.opening import open_share
from penstock.serve.ranks.group import blaming, met, store
from penstock.serve.ranks.runner import RankRunner, StageRunner
from penstock.serve.ranks.wire import Do, Done, Follow, Message, Refusal, body, parse
from penstock.serve.run.record import decoded
from penstock.serve.sizing import weight_bytes

log = logging.getLogger(__name__)


def follow(model: Decoder, config: EngineConfig, channel: Channel[Message], world: World) -> None:
    """Does what comes through ``channel`` with ``model``, a share, until it is to leave, or the first rank is gone.

    Raises:
        LossError: another rank of the ``world`` was lost or has failed.
    """
    runner: RankRunner | None = None
    assert world.watch is not None
    orders = Orders(channel)
    for message in orders:
        if message.what == "leave":
            if runner is not None:
                runner.close()
            return
        with blaming(world.watch):
            if message.what == "open":
                runner = build_following(model, config, message.arguments[0])
                if isinstance(runner, StageRunner):
                    runner.skipped = orders.skipped
            else:
                assert runner is not None
                _do(runner, message, channel)


class Orders:
    """What is to be done, in order, from a ``channel``; but that something is to be skipped overtakes the rest."""

    def __init__(self, channel: Channel[Message]) -> None:
        self._channel, self._skipped = channel, 0
        self._waiting: deque[Do] = deque()

    def __iter__(self) -> Iterator[Do]:
        while True:
            self._hear(wait=not self._waiting)
            while self._waiting:
                yield self._waiting.popleft()

    def skipped(self, number: int) -> bool:
        """Whether what is speculative of the step with this ``number`` is to be skipped, as far as is known now. Of the
        steps before it, none is asked for any more."""
        self._hear(wait=False)
        return number <= self._skipped

    def _hear(self, wait: bool) -> None:
        for message in self._channel.pending(wait):
            if message is None:
                os._exit(0)
            assert isinstance(message, Do)
            if message.what == "skip":
                (self._skipped,) = message.arguments
            else:
                self._waiting.append(message)


def _do(runner: RankRunner, message: Do, channel: Channel[Message]) -> None:
    """What :class:`~penstock.serve.ranks.runner.LeadingRunner` does, done here."""
    match message.what, message.arguments:
        case "execute", [step]:
            runner.execute(decoded(step))
        case "timed", [shape]:
            runner.timed(StepShape(*shape))
        case "choose", [*shapes]:
            runner.choose(*([StepShape(*each) for each in own] for own in shapes))
        case "try_graphs", []:
            runner.try_graphs(lambda: 0)
        case "load_adapter", [slot, folder]:
            channel.send(_loaded(runner, slot, Path(folder)))
        case "describe", []:
            memory = {"weights": weight_bytes(runner.model), "cache": (runner.blocks + 1) * runner.block_bytes}
            channel.send(Done(memory | ({"adapters": runner.adapter_bytes} if runner.adapter_bytes else {})))
        case ("forget" | "resize" | "compile_pass" | "capture") as what, arguments:
            getattr(runner, what)(*arguments)


def _loaded(runner: RankRunner, slot: int, folder: Path) -> Done | Refusal:
    """The answer to an adapter that was to be loaded. What is in its slot is used by nobody before all have it."""
    try:
        return Done(key=runner.load_adapter(slot, folder))
    except Exception as error:
        return _refusal(error, "an adapter cannot be loaded")


def _refusal(error: Exception, failed: str) -> Refusal:
    """What the first rank is told of ``error``; the log has where it comes from if nobody foresaw it."""
    if isinstance(error, PenstockError):
        return Refusal(error.what, error.hint, error.exit_code)
    log.error(failed, exc_info=error)
    return Refusal(repr(error), "", PenstockError.exit_code)


def main() -> None:
    """What the process runs: its argument is the file descriptor of its end of the socket pair."""
    # Ctrl-C and SIGTERM reach the whole group; the front end decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel: Channel[Message] = Channel(socket.socket(fileno=int(sys.argv[1])), body, parse)
    wanted = channel.receive()
    if wanted is None:
        return
    assert isinstance(wanted, Follow)
    channel.listen()
    try:
        config = EngineConfig.model_validate_json(wanted.config)
        device = torch.device(wanted.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // wanted.size))
        share = Share(wanted.rank, wanted.size)
        model = open_share(wanted.model, config, device, share)
    except Exception as error:
        channel.send(_refusal(error, f"rank {wanted.rank} cannot be opened"))
        return
    settle()
    channel.send(Done())
    world = met(share, store(share.size, wanted.port))
    with world.together(lambda error: log.error("%s", error.what)):  # what to do about it is said by the first rank
        follow(model, config, channel, world)
    world.end()


if __name__ == "__main__":
    main()
