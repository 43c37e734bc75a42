"""Prefill, compression and decode without an engine: when each request's tokens come, by what the stages take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Arrival(NamedTuple):
    """A request: when it comes, in seconds, with how many tokens of a prompt, and how many it is answered with."""

    time: float
    prompt: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a batch takes.

    Attributes:
        fixed: seconds of a batch, whatever is in it.
        each: seconds more for each token of a prompt, each cache that is compressed, or each token that is decoded.
        most: requests of a batch.
    """

    fixed: float
    each: float
    most: int

    def seconds(self, count: int) -> float:
        """Of a batch with so many tokens or caches."""
        return self.fixed + self.each * count


class Served(NamedTuple):
    """When a request's first token came, in seconds behind its arrival, and its last."""

    first: float
    last: float


@dataclasses.dataclass
class _Request:
    arrival: Arrival
    said: int = 0
    served: Served | None = None


class Queues:
    """One device, and a queue before each of the stages, first come, first served. Whenever the device is free, the
    caches that wait are compressed, whose prompts were computed last; else prompts that wait are computed; else those
    that are through both decode a token each. A batch takes what waits as it begins, up to ``most``.

    A prompt's last scores are those of the first token: it comes with the prefill, and an answer of one token is not
    compressed. With ``most`` = 1, caches are compressed one by one, as within the prefill.

    Args:
        prefill, compression, decode: what batches take.
    """

    def __init__(self, prefill: Stage, compression: Stage, decode: Stage) -> None:
        self._prefill, self._compression, self._decode = prefill, compression, decode

    def play(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """When the tokens of requests come, in the order of ``arrivals``, which is by time."""
        requests = [_Request(arrival) for arrival in arrivals]
        coming, prompts, caches, decoding = list(requests), list[_Request](), list[_Request](), list[_Request]()
        now = 0.0
        while coming or prompts or caches or decoding:
            while coming and coming[0].arrival.time <= now:
                prompts.append(coming.pop(0))
            if caches:
                batch = _first(caches, self._compression.most)
                now += self._compression.seconds(len(batch))
                decoding += batch
            elif prompts:
                batch = _first(prompts, self._prefill.most)
                now += self._prefill.seconds(sum(each.arrival.prompt for each in batch))
                caches += _said(batch, now)
            elif decoding:
                batch = _first(decoding, self._decode.most)
                now += self._decode.seconds(len(batch))
                decoding += _said(batch, now)
            else:
                now = coming[0].arrival.time
        return [each.served for each in requests if each.served is not None]


def _first(queue: list[_Request], most: int) -> list[_Request]:
    """Takes up to ``most`` out of a ``queue``."""
    taken = queue[:most]
    del queue[:most]
    return taken


def _said(batch: list[_Request], now: float) -> list[_Request]:
    """A token of each comes; those that have more to say."""
    for each in batch:
        behind = now - each.arrival.time
        each.said += 1
        each.served = Served(behind if each.served is None else each.served.first, behind)
    return [each for each in batch if each.said < each.arrival.tokens]
