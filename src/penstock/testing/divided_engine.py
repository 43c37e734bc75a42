"""An engine whose model is divided among ranks that are forked from one process."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from penstock.core.channel import Channel
from penstock.models.decoder import Decoder
from penstock.models.shares import Share
from penstock.parallel.world import World
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.link.follower import follow
from penstock.serve.ranks.group import Ranks
from penstock.serve.ranks.wire import body, parse
from penstock.testing.ranks import ranks


def together(
    size: int, part: Callable[[Share], Decoder], config: EngineConfig, act: Callable[[Engine], Any]
) -> list[dict[str, Any]]:
    """What ``act`` returns of an engine whose model is divided among ``size`` ranks, each of which has a ``part``, as
    :func:`~penstock.testing.ranks.ranks` tells it: that of the first rank is what was returned."""
    ends = [socket.socketpair() for _ in range(1, size)]

    def work(world: World) -> Any:
        torch.set_num_threads(1)
        share = Share(world.rank, size)
        model = part(share)
        if world.rank:
            channel = Channel(ends[world.rank - 1][1], body, parse)
            channel.listen()
            with world.together(print):
                follow(model, config, channel, world)
            return None
        others = Ranks(share, [Channel(pair[0], body, parse) for pair in ends], world=world)
        again = [pair[0].dup() for pair in ends]
        try:
            told = act(build_engine(model, config, ranks=others))
            if not others.lost:  # nor closed with the engine
                others.tell("leave")
        except BaseException:
            for end in again:  # what this process closes is open in others
                end.shutdown(socket.SHUT_RDWR)
            raise
        return told

    results = ranks(size, work)
    for end in (end for pair in ends for end in pair):
        end.close()
    return results
