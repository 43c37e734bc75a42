"""The contract ``serve.loop``: how the steps of an engine follow each other."""

from __future__ import annotations

from typing import Protocol

from penstock.policy import Policy, contract
from penstock.serve.engine.batch import Batch
from penstock.serve.messages import Delta


class Steps(Protocol):
    """The parts of a step, as an engine offers them to its loop.

    Attributes:
        stages: how many batches can be computed at a time, since the model is cut into so many stages.
    """

    stages: int

    def form(self, pieces: int | None = None) -> Batch | None:
        """The next batch, None where there is nothing to compute. A sequence whose next token cannot be chosen before
        the last ones are known here (a grammar that follows the text, say) is left out while they are on their way. Of
        those that decode it has one of so many ``pieces``, where that is given: the others are for batches that are
        formed before this one is published."""
        ...

    def launch(self, batch: Batch) -> None:
        """Queues the work of ``batch`` on the device; does not wait for it."""
        ...

    def publish(self, batch: Batch) -> list[Delta]:
        """Waits for the tokens of ``batch`` and hands them to their sequences."""
        ...


class Stepper(Protocol):
    """A loop at work."""

    def step(self) -> list[Delta]:
        """Does one step; returns what became known in it."""
        ...

    def drain(self) -> list[Delta]:
        """Publishes all that is queued, and queues nothing; returns what became known."""
        ...

    @property
    def idle(self) -> bool:
        """Whether no queued work is still to be published."""
        ...


@contract(
    "serve.loop",
    law="the same tokens as the plain loop for any requests; nothing queued is left unpublished; one whose next token "
    "waits for the host keeps nobody else waiting",
)
class Loop(Policy):
    """Repeats form, launch and publish."""

    def start(self, steps: Steps) -> Stepper:
        """A loop over ``steps``."""
        raise NotImplementedError
