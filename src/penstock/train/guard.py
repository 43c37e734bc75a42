"""Bad updates: those whose loss or gradient is not finite, or whose gradient is far larger than it is used to be.

With ``on_bad_update = "stop"`` a run ends at the first that is not finite. With ``"skip"`` the weights stay as they
are, the batch and the step of the schedule count as done, and the run goes on; it costs waiting for each gradient
before the weights are updated. All processes decide alike, since they all have the norms of the whole gradient.
"""

from __future__ import annotations

import dataclasses
import math

from penstock.core.errors import PenstockError

#: How much of the typical norm an update replaces, and the updates before a spike can be told.
RATE, SETTLING = 0.05, 20

#: So many bad updates in a row are no accident.
MOST_IN_A_ROW = 20


@dataclasses.dataclass
class Guard:
    """What is usual in a run, and how many updates were skipped. Its fields are part of a checkpoint.

    Attributes:
        seen: good updates so far.
        typical: their geometric mean gradient norm, of the last ones mostly.
        skipped: bad updates so far.
        in_a_row: bad updates since the last good one.
    """

    seen: int = 0
    typical: float = 0.0
    skipped: int = 0
    in_a_row: int = 0

    def admits(self, loss: float, norm: float, spike: float | None) -> bool:
        """Whether to make an update with this loss and gradient norm; counts it either way.

        Args:
            loss: of the batch.
            norm: of the whole gradient, before clipping.
            spike: how many times the typical norm is too much, None where only what is not finite is bad.

        Raises:
            PenstockError: updates have been bad for too long.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and not (spike and self.seen >= SETTLING and norm > spike * self.typical):
            rate = max(RATE, 1 / (self.seen + 1))
            self.typical = norm if not self.typical or not norm else self.typical ** (1 - rate) * norm**rate
            self.seen += 1
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise PenstockError(
                f"{self.in_a_row} updates in a row were bad (loss {loss:.4g}, gradient norm {norm:.4g})",
                hint="Lower optim.lr, or look at the data; the newest checkpoint is from before them or among them.",
            )
        return False


def require_finite(value: float, what: str, step: int, resume: str) -> None:
    """Ends a run of which ``what`` is not finite after update ``step``; ``resume`` is the command that goes on with it.

    Raises:
        PenstockError: it is not.
    """
    if not math.isfinite(value):
        raise PenstockError(
            f"{what} is {value} at step {step}",
            hint="No checkpoint was made of it. Continue with a lower learning rate from the newest one: "
            f"{resume} --set optim.lr=... (or from an older one, with --branch).",
        )
