"""What is asked of a model by several threads, computed together."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(eq=False)
class _Call(Generic[T, R]):
    """What one thread wants computed; ``found`` and ``error`` are None until it is."""

    items: list[T]
    found: list[R] | None = None
    error: Exception | None = None


class Gathered(Generic[T, R]):
    """``compute``, one thread's at a time. While it computes, other threads' items gather, and the next of them has all
    that are there computed at once. So a model scores the texts of many problems as one batch, as far as they come at
    the same time.

    Args:
        compute: gives something for each of the items that it is given. Where it raises on those of several threads,
            it is given those of each alone.
    """

    def __init__(self, compute: Callable[[list[T]], Sequence[R]]) -> None:
        self._compute = compute
        self._waiting: queue.SimpleQueue[_Call[T, R]] = queue.SimpleQueue()
        self._turn = threading.Lock()

    def __call__(self, items: Sequence[T]) -> list[R]:
        """What ``compute`` gives for ``items``.

        Raises:
            Exception: what it raises on them.
        """
        call: _Call[T, R] = _Call(list(items))
        self._waiting.put(call)
        with self._turn:
            if call.found is None and call.error is None:
                self._do(self._gathered())
        if call.error is not None:
            raise call.error
        assert call.found is not None
        return call.found

    def _gathered(self) -> list[_Call[T, R]]:
        calls: list[_Call[T, R]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                calls.append(self._waiting.get_nowait())
        return calls

    def _do(self, calls: list[_Call[T, R]]) -> None:
        try:
            found = iter(self._compute([item for call in calls for item in call.items]))
            for call in calls:
                call.found = [next(found) for _ in call.items]
        except Exception as error:
            if len(calls) == 1:
                calls[0].error = error
                return
            for call in calls:
                self._do([call])
