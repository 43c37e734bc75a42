"""A discrete-event simulation of threads: real code, run in the order in which it was begun, with times that are given.

Whoever takes a :class:`concurrent.futures.Executor` to do something beside takes a lane as well. What is submitted to
it runs at once, but in the lane's own time: from when it was submitted, or the lane was done with what came before.
Whoever asks for the outcome waits for that. So the time that code takes follows from its dependencies and from what
each piece of work is said to take, and from no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Lanes:
    """The times of several lanes, of which the one that is not named has the caller.

    Attributes:
        times: seconds that have passed in each.
        current: the lane that runs.
    """

    def __init__(self) -> None:
        self.times, self.current = {"": 0.0}, ""

    @property
    def now(self) -> float:
        """Seconds that have passed in the lane that runs."""
        return self.times[self.current]

    def spend(self, seconds: float) -> None:
        """What runs takes so long."""
        self.times[self.current] += seconds

    def until(self, time: float) -> None:
        """What runs waits for ``time``, unless it has passed."""
        self.times[self.current] = max(self.now, time)


class Lane(Executor):
    """The lane ``name`` of some ``lanes``."""

    def __init__(self, lanes: Lanes, name: str) -> None:
        self._lanes, self._name = lanes, name
        lanes.times[name] = 0.0

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        lanes, caller = self._lanes, self._lanes.current
        begin = lanes.now
        lanes.current = self._name
        lanes.until(begin)
        outcome = Outcome(lanes)
        try:
            outcome.set_result(work(*args, **options))
        except BaseException as error:
            outcome.set_exception(error)
        outcome.end, lanes.current = lanes.now, caller
        return outcome


class Outcome(Future[Any]):
    """What came of something, at a time."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__()
        self._lanes, self.end = lanes, 0.0

    def result(self, timeout: float | None = None) -> Any:
        self._lanes.until(self.end)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._lanes.until(self.end)
        return super().exception(timeout)

    def done(self) -> bool:
        return self.end <= self._lanes.now
