"""A length that grows while all of it is accepted, and shrinks else."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller, Seen


class GrowAndShrink(Control):
    """See :class:`Bass`."""

    def __init__(self, policy: Bass, most: int) -> None:
        self._policy, self._most = policy, most
        self._length, self._shrank = min(policy.first, most), 0

    def ahead(self, sequences: int) -> int:
        return self._length

    def learn(self, seen: Seen) -> None:
        if not any(seen.drafted):
            return
        best = max(seen.accepted)
        if best >= self._length:
            self._length, self._shrank = min(self._length + self._policy.grow, self._most), 0
        else:
            less = -(-self._length // self._policy.shrink) + self._shrank
            self._length, self._shrank = max(1, best, self._length - less), 1


@policy("speculate.controller", "bass", papers=[160])
class Bass(Controller):
    """One length for the batch, which grows where a sequence accepted all of it, and shrinks where none did.

    The rule is from knowledge, not from the abstract: it grows by ``grow`` tokens if the luckiest sequence of the last
    step accepted all; else it shrinks by a share of itself, and by one more if it shrank before, but not below what the
    luckiest accepted. Ours: no more than the drafter's own most.

    Attributes:
        first: the length at the start.
        grow: by how many tokens it grows.
        shrink: it shrinks by 1 / ``shrink`` of itself, rounded up.
    """

    first: Annotated[int, Field(ge=1, le=64)] = 4
    grow: Annotated[int, Field(ge=1, le=16)] = 2
    shrink: Annotated[int, Field(ge=1, le=64)] = 10

    def start(self, most: int) -> Control:
        return GrowAndShrink(self, most)
