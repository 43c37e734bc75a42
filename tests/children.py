"""Children that are forked from this process, which has imported and loaded everything, to be killed."""

from __future__ import annotations

import os
from collections.abc import Callable


def born(work: Callable[[], object]) -> int:
    """Starts a child that does ``work``; its process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def running(child: int) -> bool:
    """Whether it has not ended yet, by itself or not; it can be waited for afterwards all the same."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
