"""PipeDream: 1F1B without a flush, with stashed weights."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, Schedule, Task, WeightRule
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "pipedream", papers=[110])
class PipeDream(PipelineSchedule):
    """Asynchronous 1F1B: each stage updates its weights after every minibatch, and pipelines never drain.

    The microbatches of the schedule are the paper's minibatches, as many as it is to run for; only its ends idle. The
    backward of a minibatch sees the version of the weights that its forward saw. Of p stages, stage s sees the weights
    as they were p-1-s updates ago, and holds at most p-s versions and as many activations.

    ``replicas`` says how many devices each stage has, p in all, as ``penstock pipeline partition`` finds them from a
    profile of the layers; by default one. Minibatches go round-robin over them. With n devices from a stage on, r of
    them its own, each of these has up to ceil(n/r) minibatches in flight, which is the paper's count for the input
    stage, and our reading for the others.
    """

    replicas: tuple[PositiveInt, ...] | None = Field(None, min_length=1)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        replicas = self.replicas or (1,) * devices
        if sum(replicas) != devices:
            raise RefusalError(
                f"pipedream: stages with {', '.join(map(str, replicas))} replicas take {sum(replicas)} devices, not "
                f"{devices}",
                devices=sum(replicas),
                microbatches=microbatches,
            )
        placement = []
        orders = []
        for stage, own in enumerate(replicas):
            first = sum(replicas[:stage])
            placement.append(tuple(range(first, first + own)))
            in_flight = -(-(devices - first) // own)
            orders += [_order(stage, replica, range(replica, microbatches, own), in_flight) for replica in range(own)]
        return Schedule(tuple(placement), tuple(orders), microbatches, WeightRule.STASH)


def _order(stage: int, replica: int, microbatches: range, in_flight: int) -> tuple[Task, ...]:
    """F up to ``in_flight``, then B and F in turns."""
    forwards = [Task(Kind.F, stage, microbatch, replica) for microbatch in microbatches]
    order = forwards[:in_flight]
    for done, microbatch in enumerate(microbatches):
        order.append(Task(Kind.B, stage, microbatch, replica))
        order += forwards[in_flight + done : in_flight + done + 1]
    return tuple(order)
