"""DualPipeV: a V-shaped pipeline whose forwards and backwards run in overlapped pairs."""

from __future__ import annotations

from typing import NamedTuple

from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import Kind, Schedule, Task, zigzag
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.policy import policy


class Pass(NamedTuple):
    """``kind`` of the microbatch ``number`` in one of the two ``streams`` of a device; ``overlapped`` with the next."""

    stream: int
    kind: Kind
    number: int
    overlapped: bool = False


@policy("pipeline.schedule", "dualpipev")
class DualPipeV(PipelineSchedule):
    """DualPipe cut in half: its two directions are the two legs of a V, with one copy of the model.

    In the steady state each device runs F of one leg together with B of the other, so that the communication within one
    (of experts, say) hides behind the computation of the other; the simulator's ``overlap`` says what that gains. The
    runtime runs the two of a pair after each other. The order is that of DeepSeek's program, and so of PyTorch's
    ScheduleDualPipeV. Where a pair gains nothing, and F takes as long as I, a device idles for (p-1)(F + 2B - 3W) of
    one of its two stages. It needs m >= 2p.
    """

    def arrange(self, devices: int, microbatches: int) -> Schedule:
        if microbatches < 2 * devices:
            raise RefusalError(
                f"dualpipev fills its pipeline with two microbatches a device: {microbatches} are too few for "
                f"{devices}",
                devices=devices,
                microbatches=2 * devices,
            )
        overlapped = set()
        orders = []
        for device in range(devices):
            order = []
            for step in passes(devices, device, microbatches):
                task = Task(step.kind, 2 * devices - 1 - device if step.stream else device, step.number)
                order.append(task)
                if step.overlapped:
                    overlapped.add(task)
            orders.append(tuple(order))
        return Schedule(zigzag(devices, 2), tuple(orders), microbatches, overlapped=frozenset(overlapped))


def passes(depth: int, place: int, microbatches: int) -> list[Pass]:
    """What a device does that is ``place`` steps into its first stream, where streams are ``depth`` devices long.

    Stream 0 is the half of a microbatch's way that begins here, stream 1 the half that ends here; each carries so many
    microbatches.
    """
    device = _Device()
    for _ in range(2 * (depth - 1 - place)):
        device.forward(0)
    for _ in range(place + 1):
        device.forward(0)
        device.forward(1)
    for _ in range(depth - 1 - place):
        device.input_grad(1)
        device.weight_grad()
        device.forward(1)
    for first in (number == 0 for number in range(microbatches - 2 * depth + place + 1)):
        # Where the streams meet, the first backward waits for the forward before it.
        device.both(0, 1, overlapped=not (first and place == depth - 1))
        device.both(1, 0)
    for _ in range(depth - 1 - place):
        device.backward(1)
        device.both(1, 0)
    half = (place + 1) // 2
    for number in range(place + 1):
        split_near = number > half or (number == half and place % 2 == 1)
        device.input_grad(1) if split_near else device.backward(1)
        device.input_grad(0) if number >= half else device.backward(0)
    for _ in range(depth - 1 - place):
        device.weight_grad()
        device.input_grad(0)
    for _ in range(place + 1):
        device.weight_grad()
    return device.done


class _Device:
    """The passes of a device so far."""

    def __init__(self) -> None:
        self.done: list[Pass] = []
        self._forwards, self._backwards = [0, 0], [0, 0]
        self._waiting: list[Pass] = []

    def forward(self, stream: int, overlapped: bool = False) -> None:
        """F of the next microbatch."""
        self.done.append(Pass(stream, Kind.F, self._forwards[stream], overlapped))
        self._forwards[stream] += 1

    def backward(self, stream: int, kind: Kind = Kind.B) -> None:
        """B of the next microbatch."""
        self.done.append(Pass(stream, kind, self._backwards[stream]))
        self._backwards[stream] += 1

    def both(self, forward: int, backward: int, overlapped: bool = True) -> None:
        """F of one stream and B of the other."""
        self.forward(forward, overlapped)
        self.backward(backward)

    def input_grad(self, stream: int) -> None:
        """I of the next microbatch."""
        self.backward(stream, Kind.I)
        self._waiting.append(self.done[-1]._replace(kind=Kind.W))

    def weight_grad(self) -> None:
        """The W that has waited longest."""
        self.done.append(self._waiting.pop(0))
