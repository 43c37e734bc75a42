"""How much work something is, by measures that other load on the machine does not change."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


def calls(work: Callable[[], object]) -> int:
    """How many functions, Python's and C's, ``work`` calls."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def lines(work: Callable[[], object]) -> int:
    """How many lines of Python ``work`` runs: the same number on every machine."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def loops(work: Callable[[], object]) -> float:
    """The processor's time for ``work``, in units of a loop of a million additions that runs beside it.

    For work that Python cannot count; such a loop takes some 20 to 60 ms.
    """
    before, taken, after = _seconds(_loop), _seconds(work), _seconds(_loop)
    return taken / ((before + after) / 2)


def _loop() -> None:
    total = 0
    for number in range(1_000_000):
        total += number


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
