"""The zero-bubble paper's greedy scheduler and its binary choices, for one stage on each device.

It goes through the microbatches: each device runs an F, if it is to, from the first one to the last, and then each runs
an I, from the last one to the first. W go where a device waits. This is the heuristic of the paper's implementation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from penstock.pipeline.ir.schedule import Kind
from penstock.pipeline.ordering.words import Problem, Word

_F, _I, _W = Kind.F, Kind.I, Kind.W


def variants(problem: Problem) -> Iterator[list[Word]]:
    """The words of all choices; those that run out of memory are left out."""
    for wait, skip, fill in itertools.product((True, False), repeat=3):
        words = _Greedy(problem, wait, skip, fill).run()
        if words is not None:
            yield words


class _Greedy:
    """One run of the scheduler.

    Args:
        problem: with one stage on each device.
        wait: in the warm-up, rather wait for the first I than delay it with an F.
        skip: leave an F out where the next device is behind, and this one idles less than others.
        fill: put a W into a gap that is shorter than it, even on a device that idles less than others.
    """

    def __init__(self, problem: Problem, wait: bool, skip: bool, fill: bool) -> None:
        p = problem.devices
        self.problem, self.wait, self.skip, self.fill = problem, wait, skip, fill
        self.words: list[Word] = [[] for _ in range(p)]
        self.ends: list[list[list[float]]] = [[[], [], []] for _ in range(p)]  # of F, I and W
        self.clocks, self.held, self.idle = [0.0] * p, [0.0] * p, [0.0] * p

    def run(self) -> list[Word] | None:
        """The words; None where an F finds no memory."""
        devices = range(self.problem.devices)
        self._warm_up()
        for _ in range(1, self.problem.microbatches):
            for device in (device for device, forward in enumerate(self._forwards()) if forward):
                if not self._make_room(device):
                    return None
                self._fill_gap(device, _F)
                self._put(device, _F)
            for device in reversed(devices):
                self._fill_gap(device, _I)
                if device == 0 and self._count(0, _F) == self.problem.microbatches:
                    self._put_weights(0)
                self._put(device, _I)
        for device in devices:
            self._put_weights(device)
        return self.words

    def _warm_up(self) -> None:
        """The first F and I of all devices, and between them as many F as there is time and memory for, though on each
        device fewer than on the one before."""
        p, problem = self.problem.devices, self.problem
        for device in range(p):
            self._put(device, _F)
        extra = [0] * p
        due = self.clocks[-1] + problem.seconds[-1][_I]  # when the next device has made the first gradient
        for device in reversed(range(p - 1)):
            arrival, clock, seconds = due + problem.transfer, self.clocks[device], problem.seconds[device][_F]
            most = problem.microbatches - 1
            while extra[device] < most and problem.fits(self.held[device] + extra[device] + 1):
                if (clock + seconds > arrival) if self.wait else (clock >= arrival):
                    break
                clock += seconds
                extra[device] += 1
            due = max(clock, arrival) + problem.seconds[device][_I]
        for device in range(1, p):
            if extra[device] < problem.microbatches - 1:
                extra[device] = max(0, min(extra[device], extra[device - 1] - 1))
        for device, count in enumerate(extra):
            for _ in range(count):
                self._put(device, _F)
        for device in reversed(range(p)):
            self._put(device, _I)

    def _forwards(self) -> list[bool]:
        """Which devices run an F: none before one that does not."""
        wanted = [self._wants_forward(device) for device in range(self.problem.devices)]
        return [all(wanted[device:]) for device in range(len(wanted))]

    def _wants_forward(self, device: int) -> bool:
        done, after = self._count(device, _F), device + 1
        if done == self.problem.microbatches:
            return False
        if not self.skip or after == self.problem.devices or done < self._count(after, _F) + 2:
            return True
        clock, seconds, problem = self.clocks[device], self.problem.seconds, self.problem
        due = self.clocks[after] + seconds[after][_F] + seconds[after][_I] + problem.transfer
        if clock >= due:
            return False
        room, pending = self.held[device] + 1, self._count(device, _I) - self._count(device, _W)
        weights = 0
        while not problem.fits(room - weights * problem.deferred) and weights < pending:
            weights += 1
        if clock + seconds[device][_F] + weights * seconds[device][_W] <= due:
            return True
        return due - clock > max(self.idle) - self.idle[device]

    def _make_room(self, device: int) -> bool:
        """Runs W until there is memory for an F; False where these do not suffice."""
        while not self.problem.fits(self.held[device] + 1):
            if self._count(device, _W) == self._count(device, _I):
                return False
            self._put(device, _W)
        return True

    def _fill_gap(self, device: int, kind: Kind) -> None:
        """Runs W until the input of the next F or I is there."""
        arrival, seconds = self._arrival(device, kind), self.problem.seconds[device][_W]
        while self._count(device, _W) < self._count(device, _I) and self.clocks[device] + seconds <= arrival:
            self._put(device, _W)
        gap = arrival - self.clocks[device]
        worthwhile = self.fill or gap > max(self.idle) - self.idle[device]
        if gap > 0 and worthwhile and self._count(device, _W) < self._count(device, _I):
            self._put(device, _W)

    def _put_weights(self, device: int) -> None:
        """Runs all W of the I so far."""
        while self._count(device, _W) < self._count(device, _I):
            self._put(device, _W)

    def _put(self, device: int, kind: Kind) -> None:
        """Runs the next task of ``kind``."""
        start = max(self.clocks[device], self._arrival(device, kind))
        if self.words[device]:
            self.idle[device] += start - self.clocks[device]
        self.clocks[device] = start + self.problem.seconds[device][kind]
        self.ends[device][kind].append(self.clocks[device])
        self.words[device].append(kind)
        self.held[device] += self.problem.changes[kind]

    def _arrival(self, device: int, kind: Kind) -> float:
        """When the input of the next task of ``kind`` is there."""
        source = None if kind is _W else self.problem.sources[device][kind]
        if source is None or source[0] == device:
            return 0.0
        made, number = self.ends[source[0]][source[1]], self._count(device, kind)
        return made[number] + source[2] if number < len(made) else math.inf

    def _count(self, device: int, kind: Kind) -> int:
        return len(self.ends[device][kind])
