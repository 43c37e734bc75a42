"""The contract of pipeline schedules."""

from __future__ import annotations

from penstock.pipeline.ir.refusal import check_size
from penstock.pipeline.ir.schedule import Schedule
from penstock.policy import Policy, contract


@contract(
    "pipeline.schedule",
    law="every task once, consistent with the dependencies, free of deadlock; the simulated peak of live activations "
    "and the version of the weights that each task sees equal to a count by brute force; a refusal names numbers that "
    "work; loss and all gradients on several processes equal to one device in fp64 (without a flush, the weights to "
    "those of the delayed updates); the measured peak of live activations equal to the simulated one; updates of the "
    "trainer on several processes equal to those of one device",
)
class PipelineSchedule(Policy):
    """Orders the work of one training step on a pipeline of devices.

    Options say how the model is cut (chunks on a device, waves); the number of stages follows from them.
    """

    def build(self, devices: int, microbatches: int) -> Schedule:
        """The schedule of ``microbatches`` m >= 1 on ``devices`` p >= 1.

        Raises:
            UsageError: a number is not positive.
            RefusalError: there is no such schedule for these numbers; it names the smallest change that would work.
        """
        check_size(devices, microbatches)
        return self.arrange(devices, microbatches)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        """What a policy gives: the schedule, for numbers that are positive; or it raises ``RefusalError``."""
        raise NotImplementedError
