"""Scheduling in the shadow of the device."""

from __future__ import annotations

from collections import deque

from penstock.policy import policy
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.loops.contract import Loop, Stepper, Steps
from penstock.serve.messages import Delta


class OverlappedStepper:
    """See :class:`Overlapped`."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._queued: deque[Batch] = deque()
        # Beside the one that is waited for: so that the device has another, or that each stage has one.
        self._ahead = max(1, steps.stages - 1)

    @property
    def idle(self) -> bool:
        return not self._queued

    def step(self) -> list[Delta]:
        stages = self._steps.stages
        batch = self._steps.form(stages - len(self._queued) if stages > 1 else None)
        if batch is None:
            return self._publish()
        self._steps.launch(batch)
        self._queued.append(batch)
        return self._publish() if len(self._queued) > self._ahead else []

    def drain(self) -> list[Delta]:
        return [delta for _ in range(len(self._queued)) for delta in self._publish()]

    def _publish(self) -> list[Delta]:
        return self._steps.publish(self._queued.popleft()) if self._queued else []


@policy("serve.loop", "overlapped")
class Overlapped(Loop):
    """Step n + 1 is formed and queued before the tokens of step n are known here; they go from step to step on the
    device (asynchronous scheduling, a part of NanoFlow).

    A sequence that a stop token ends is noticed one step late; the token computed after it is dropped. One that waits
    for its tokens takes part in every second step; where all do, steps follow each other as in the plain loop. They do
    so too where tokens are drafted: all go on in the same steps, since each costs about as much for one as for many.

    Where the model is cut into stages, as many steps are on their way as there are stages, each with a part of the
    sequences that decode (ours).
    """

    def start(self, steps: Steps) -> Stepper:
        return OverlappedStepper(steps)
