"""The contract of transforms of pipeline schedules."""

from __future__ import annotations

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import Schedule, WeightRule
from penstock.policy import Policy, contract


@contract(
    "pipeline.transform",
    law="the same forwards and backwards on the same devices, complete and free of deadlock, in no more time at the "
    "times that it was made for; loss and all gradients on several processes equal to one device in fp64; updates of "
    "the trainer on several processes equal to those of one device",
)
class PipelineTransform(Policy):
    """Makes a better schedule of any schedule with a flush."""

    def apply(self, schedule: Schedule) -> Schedule:
        """The transformed schedule. Overlapped pairs stay pairs where their tasks still follow each other.

        Raises:
            UsageError: it has no flush, or the options do not fit it.
        """
        if schedule.weights is not WeightRule.FLUSH:
            raise UsageError(
                f"{self.policy_name} transforms schedules with one version of the weights; this one stashes several",
                hint="Transform 1f1b, which has the order of pipedream and one update a step.",
            )
        return self.transform(schedule)

    def transform(self, schedule: Schedule) -> Schedule:
        """What a policy gives: the transformed schedule."""
        raise NotImplementedError
