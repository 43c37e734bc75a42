"""Scheduling in the shadow of the device."""

from __future__ import annotations

from penstock.policy import policy
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.loops.contract import Loop, Stepper, Steps
from penstock.serve.messages import Delta


class OverlappedStepper:
    """See :class:`Overlapped`."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._queued: Batch | None = None

    @property
    def idle(self) -> bool:
        return self._queued is None

    def step(self) -> list[Delta]:
        batch = self._steps.form()
        if batch is not None:
            self._steps.launch(batch)
        return self._publish(batch)

    def drain(self) -> list[Delta]:
        return self._publish(None)

    def _publish(self, following: Batch | None) -> list[Delta]:
        done, self._queued = self._queued, following
        return [] if done is None else self._steps.publish(done)


@policy("serve.loop", "overlapped")
class Overlapped(Loop):
    """Step n + 1 is formed and queued before the tokens of step n are known here; they go from step to step on the
    device (asynchronous scheduling, a part of NanoFlow).

    A sequence that a stop token ends is noticed one step late; the token computed after it is dropped. One that waits
    for its tokens takes part in every second step; where all do, steps follow each other as in the plain loop.
    """

    def start(self, steps: Steps) -> Stepper:
        return OverlappedStepper(steps)
