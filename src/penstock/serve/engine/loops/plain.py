"""The readable loop: one thing after the other."""

from __future__ import annotations

from penstock.policy import policy
from penstock.serve.engine.loops.contract import Loop, Stepper, Steps
from penstock.serve.messages import Delta


class PlainStepper:
    """See :class:`Plain`."""

    idle = True

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def drain(self) -> list[Delta]:
        return []

    def step(self) -> list[Delta]:
        batch = self._steps.form()
        if batch is None:
            return []
        self._steps.launch(batch)
        return self._steps.publish(batch)


@policy("serve.loop", "plain")
class Plain(Loop):
    """Form a batch, compute it, publish its tokens, and only then form the next."""

    def start(self, steps: Steps) -> Stepper:
        return PlainStepper(steps)
