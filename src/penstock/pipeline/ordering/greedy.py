"""A greedy scheduler of F, I and W in simulated time, for one stage on each device, and the grid of its choices.

A device takes F of the warm-up up to a bound, then I and F in turns, W in gaps and where memory is full. That is ours,
beside the zero-bubble paper's in :mod:`penstock.pipeline.ordering.zero_bubble`, which goes by microbatches and not by
time.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator

from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.ordering.words import Problem, Word

_F, _I, _W = Kind.F, Kind.I, Kind.W


@dataclasses.dataclass(frozen=True)
class Choices:
    """One point of the grid.

    Attributes:
        in_flight: for each device, the most microbatches between F and I.
        fill: put a W into a gap that is shorter than it.
        extend: in the warm-up, run an F even where it delays the first I.
        alternate: after an I, prefer an F to the next I.
    """

    in_flight: tuple[int, ...]
    fill: bool
    extend: bool
    alternate: bool


def grid(problem: Problem) -> Iterator[list[Word]]:
    """The words of all choices, the more promising for long pipelines first.

    The bounds on what is in flight are those of ZB-H2, those of 1F1B, and memory alone.
    """
    p = problem.devices
    bounds = (
        tuple(2 * (p - device) - 1 for device in range(p)),
        tuple(p - device for device in range(p)),
        (problem.microbatches,) * p,
    )
    for alternate, extend, in_flight, fill in itertools.product((True, False), (True, False), bounds, (False, True)):
        yield _Greedy(problem, Choices(in_flight, fill, extend, alternate)).run()


class _Greedy:
    """One run of the greedy scheduler: a device decides when it gets free, and whenever an input arrives.

    What a device knows of arrivals is what its neighbours have begun to send by then.
    """

    def __init__(self, problem: Problem, choices: Choices) -> None:
        devices = range(problem.devices)
        self.problem, self.choices = problem, choices
        self.words: list[Word] = [[] for _ in devices]
        self.arrived: tuple[list[list[float]], list[list[float]]] = ([[] for _ in devices], [[] for _ in devices])
        self.arrived[_F][0] = [0.0] * problem.microbatches
        self.counts = [[0, 0, 0] for _ in devices]
        self.held = [0.0] * problem.devices
        self.free = [0.0] * problem.devices
        self.events = [(0.0, device) for device in devices]

    def run(self) -> list[Word]:
        """The words."""
        for _ in range(3 * self.problem.devices * self.problem.microbatches):
            kind = None
            while kind is None:
                time, device = heapq.heappop(self.events)
                if time >= self.free[device]:
                    kind = self._choose(device, time)
            self._perform(device, kind, time)
        return self.words

    def _choose(self, device: int, time: float) -> Kind | None:
        """What ``device`` begins at ``time``; None where it waits for the next event."""
        forwards, backwards, weights = self.counts[device]
        next_f, next_i = math.inf, math.inf
        roomy = self.problem.fits(self.held[device] + 1)
        if roomy and forwards - backwards < self.choices.in_flight[device]:
            next_f = _item(self.arrived[_F][device], forwards)
        if backwards < forwards:
            next_i = _item(self.arrived[_I][device], backwards)
        if next_i <= time:
            if next_f <= time and (self._forward_first(device) if backwards else self.choices.extend):
                return _F
            return _I
        delays = not backwards and time + self.problem.seconds[device][_F] > next_i
        if next_f <= time and (self.choices.extend or not delays):
            return _F
        if weights < backwards:
            gap = min(next_f, next_i) - time
            if self.choices.fill or gap >= self.problem.seconds[device][_W] or gap == math.inf:
                return _W
        return None

    def _forward_first(self, device: int) -> bool:
        """Whether the last F or I was an I, and they alternate."""
        return self.choices.alternate and next(kind for kind in reversed(self.words[device]) if kind is not _W) is _I

    def _perform(self, device: int, kind: Kind, time: float) -> None:
        end = time + self.problem.seconds[device][kind]
        self.free[device] = end
        self.words[device].append(kind)
        self.counts[device][kind] += 1
        self.held[device] += self.problem.changes[kind]
        heapq.heappush(self.events, (end, device))
        if kind is _W:
            return
        target, arrival = device + (1 if kind is _F else -1), end + self.problem.transfer
        if target == self.problem.devices:  # the last stage turns around by itself
            target, arrival, kind = device, end, _I
        if target >= 0:
            self.arrived[kind][target].append(arrival)
            heapq.heappush(self.events, (arrival, target))


def _item(times: list[float], index: int) -> float:
    return times[index] if index < len(times) else math.inf
