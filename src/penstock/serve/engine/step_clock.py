"""What steps take, where the next one may be on its way before the tokens of one are known."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable


@dataclasses.dataclass
class _Launched:
    """When a step was begun, and the next one before its tokens were known; whether others were under way then."""

    begun: float
    behind: bool
    followed: float | None = None


class StepClock:
    """Times steps by when they begin and end; those that are under way end in the order in which they began.

    A step that is alone takes from the end of the one before it, if there was work to do since then, until its own
    end: what the host does in between is a part of what it costs. Where steps overlap, what one takes is when the next
    one begins after it: its end may come late, since the host prepares the next step meanwhile, or computes it, on a
    CPU. The first of such steps and the last one cannot be told: the one begins while nothing is under way, nothing
    follows the other.
    """

    def __init__(self) -> None:
        self._under_way: deque[_Launched] = deque()
        self._ended: float | None = None

    def begin(self, now: float, busy: Callable[[], bool] = lambda: False) -> None:
        """A step begins; ``busy`` says, if it is asked, whether there was work to do since the end of the last one."""
        if self._under_way:
            self._under_way[-1].followed = now
            self._under_way.append(_Launched(now, behind=True))
        else:
            begun = self._ended if self._ended is not None and busy() else now
            self._under_way.append(_Launched(begun, behind=False))

    def end(self, now: float) -> float | None:
        """The tokens of the first step that is under way are known: the seconds that it took, if they can be told."""
        step, self._ended = self._under_way.popleft(), now
        if step.followed is None:
            return None if step.behind else now - step.begun
        return step.followed - step.begun if step.behind else None
