"""Interleaved 1F1B: several chunks of the model on each device."""

from __future__ import annotations

from pydantic import Field

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, Schedule, Task, looped
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


@policy("pipeline.schedule", "interleaved_1f1b", papers=[6])
class Interleaved1F1B(PipelineSchedule):
    """1F1B over v = ``chunks`` stages a device, in rounds of p microbatches through one chunk (Megatron-LM).

    The bubble shrinks v-fold, to (p-1)/v times the forward and backward of a microbatch on a p-th of the model, for v
    times the transfers. Device d starts with 2(p-1-d) + (v-1)p forwards. As in the paper, m must be a multiple of p.
    """

    chunks: int = Field(2, ge=2)

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        if microbatches % devices:
            raise RefusalError(
                f"interleaved_1f1b runs microbatches in rounds of one for each device: {microbatches} are no multiple "
                f"of {devices}",
                devices=devices,
                microbatches=-(-microbatches // devices) * devices,
            )
        orders = tuple(self._order(device, devices, microbatches) for device in range(devices))
        return Schedule(looped(devices, self.chunks), orders, microbatches)

    def _order(self, device: int, devices: int, microbatches: int) -> tuple[Task, ...]:
        total = microbatches * self.chunks

        def task(kind: Kind, step: int) -> Task:
            rounds, within = divmod(step, devices * self.chunks)
            chunk, slot = divmod(within, devices)
            if kind is Kind.B:
                chunk = self.chunks - 1 - chunk
            return Task(kind, chunk * devices + device, rounds * devices + slot)

        warmup = min(total, 2 * (devices - 1 - device) + (self.chunks - 1) * devices)
        order = [task(Kind.F, step) for step in range(warmup)]
        for step in range(total):
            if warmup + step < total:
                order.append(task(Kind.F, warmup + step))
            order.append(task(Kind.B, step))
        return tuple(order)
