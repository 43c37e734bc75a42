"""Runs a schedule: each process goes through its device's list, with transfers under way beside the work.

All processes hold the same schedule; nothing else is agreed upon. What a stage computes is the caller's: a function
from its input to its output and its share of the loss. See :mod:`~penstock.pipeline.transfers` for why no order of
tasks can deadlock, :mod:`~penstock.pipeline.split_backward` for I and W, and :mod:`~penstock.pipeline.replicas` for the
sums of gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from penstock.core.errors import UsageError
from penstock.pipeline.grid import Grid
from penstock.pipeline.ir import Kind, Schedule, Task, WeightRule
from penstock.pipeline.replicas import Replicas
from penstock.pipeline.split_backward import Deferral
from penstock.pipeline.transfers import Routes, Transfers, met_by, need_of
from penstock.pipeline.validate import validate

#: ``forward(stage, microbatch, x)``: x is None for the first stage on the microbatch's path, and the output None for
#: the last one; the loss is a scalar, or None where the stage adds nothing to it.
Forward = Callable[[int, int, Tensor | None], tuple[Tensor | None, Tensor | None]]


class Live(NamedTuple):
    """What is kept of a forward pass: its input, where its backward pass begins, and what W will need.

    ``weight`` is the gradient of the loss in itself: one, in its dtype; None where there is no loss.
    """

    x: Tensor | None
    roots: list[GradientEdge]
    weight: Tensor | None
    deferral: Deferral | None


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of one device gave.

    Attributes:
        loss: scalar, float32 (float64 for float64 messages), the sum over this device's tasks; 0 where none adds to it.
        peak_activations: the most activations (of one stage and microbatch) that were held at once, from F to B or W.
        spans: for each task of the device's list, seconds from the start of the step to its start, which is when its
            input was there, and to its end.
    """

    loss: Tensor
    peak_activations: int
    spans: list[tuple[float, float]]


class Runtime:
    """Runs ``schedule`` on the processes of ``grid``, over and over.

    Every process makes it, at the same time.

    Args:
        schedule: any; validated here.
        grid: as many devices as the schedule has.
        parameters: all trained ones on this device, by name.
        names: those of each stage, on whatever device. A parameter that several devices hold, be it for replicas of a
            stage or because two stages share it, ends with the sum of its gradients on each.
        dtype, device: of the messages between stages.

    Raises:
        ScheduleError: the schedule cannot run.
        UsageError: it updates weights within a step, or offloads activations: that is simulated only.
        PenstockError: another process is lost.
    """

    def __init__(
        self,
        schedule: Schedule,
        grid: Grid,
        parameters: Mapping[str, nn.Parameter],
        names: Sequence[Sequence[str]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        validate(schedule)
        _require_flush(schedule)
        self.schedule, self.grid, self.dtype, self.device = schedule, grid, dtype, device
        self.order = schedule.orders[grid.device]
        self._routes = Routes(schedule)
        grid.connect(sorted(self._routes.queues), device)
        self._replicas = Replicas(schedule, names, grid, parameters)
        self._split = {(task.stage, task.microbatch) for task in self.order if task.kind is Kind.W}

    def step(
        self,
        forward: Forward,
        shapes: Sequence[Sequence[int]],
        collect: Callable[[], None] = lambda: None,
    ) -> Step:
        """Forward and backward of all microbatches. Leaves the gradients in ``.grad``, which must be empty before.

        Args:
            forward: what a stage computes.
            shapes: of the messages of each microbatch.
            collect: called after each B and W, to take gradients elsewhere; what it leaves in the ``.grad`` of
                ``parameters`` is summed over their holders.

        Raises:
            PenstockError: another process is lost; the message names its rank and the task that was waited for.
        """
        transfers = Transfers(self._routes, self.grid, self.schedule, shapes, self.dtype, self.device)
        work = _Work(self, forward, transfers)
        clock = _Clock(self.device)
        self._replicas.begin()
        for task in self.order:
            need = need_of(self.schedule, task)
            given = None if need is None else transfers.take(need)
            clock.start()
            made = work.run(task, given)
            clock.stop()
            meets = met_by(self.schedule, task)
            if meets is not None and made is not None:
                transfers.give(meets, made)
            if task.kind in (Kind.B, Kind.W):
                collect()
                self._replicas.done(task.stage)
        transfers.finish()
        self._replicas.finish()
        self._settle(clock)
        return Step(work.loss, work.peak, clock.spans())

    def _settle(self, clock: _Clock) -> None:
        """Waits for the device's queue of work. A message that never comes shows there, not where it was asked for."""
        for number, task in enumerate(self.order):
            deadline = time.monotonic() + self.grid.timeout
            while not clock.done(number):
                if time.monotonic() > deadline:
                    need = need_of(self.schedule, task)
                    source, awaited = self._routes.sources[need] if need else (self.grid.device, task)
                    raise self.grid.lost(self.grid.rank(source), f"its {awaited}", patience=0.2 * self.grid.timeout)
                time.sleep(1e-4)


def _require_flush(schedule: Schedule) -> None:
    if schedule.weights is not WeightRule.FLUSH:
        raise UsageError(
            "this schedule updates the weights after each microbatch, which is simulated only",
            hint="Run 1f1b, which has the order of pipedream and one update a step.",
        )
    if schedule.offloaded:
        raise UsageError(
            "this schedule offloads activations to the host, which is simulated only",
            hint="Run the schedule that it was made of.",
        )


class _Work:
    """The computations of one step, and what is held between them."""

    def __init__(self, runtime: Runtime, forward: Forward, transfers: Transfers) -> None:
        self._runtime, self._forward = runtime, forward
        self._live: dict[tuple[int, int], Live] = {}
        self.loss = torch.zeros((), dtype=torch.promote_types(runtime.dtype, torch.float32), device=runtime.device)
        self.peak = 0

    def run(self, task: Task, given: Tensor | None) -> Tensor | None:
        """Does ``task`` with what it was given; returns what the next or the previous stage waits for."""
        key = task.stage, task.microbatch
        match task.kind:
            case Kind.F:
                return self._run_forward(key, given)
            case Kind.I:
                live = self._live[key]
                self._live[key] = Live(None, [], None, live.deferral)
                return self._run_backward(live, given)
            case Kind.W:
                deferral = self._live.pop(key).deferral
                assert deferral is not None
                deferral.run()
                return None
            case Kind.B:
                return self._run_backward(self._live.pop(key), given)

    def _run_forward(self, key: tuple[int, int], x: Tensor | None) -> Tensor | None:
        deferral = Deferral() if key in self._runtime._split else None
        if x is not None:
            x = x.detach().requires_grad_()
        with deferral or contextlib.nullcontext():
            output, loss = self._forward(*key, x)
        # Not the output itself: its values are the next stage's, and only its place in the graph is needed here.
        roots = [get_gradient_edge(root) for root in (output, loss) if root is not None]
        self._live[key] = Live(x, roots, None if loss is None else torch.ones_like(loss), deferral)
        self.peak = max(self.peak, len(self._live))
        if loss is not None:
            self.loss = self.loss + loss.detach()
        return None if output is None else output.detach()

    def _run_backward(self, live: Live, gradient: Tensor | None) -> Tensor | None:
        torch.autograd.backward(live.roots, [g for g in (gradient, live.weight) if g is not None])
        return None if live.x is None else live.x.grad


class _Clock:
    """Times of tasks: the process's clock, or, on CUDA, events in the queue of work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._marks: list[float | torch.cuda.Event] = []

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self) -> None:
        """Notes that a task starts."""
        self._marks.append(self._now())

    def stop(self) -> None:
        """Notes that it ends."""
        self._marks.append(self._now())

    def done(self, number: int) -> bool:
        """Whether the task of that number has ended on the device."""
        end = self._marks[2 * number + 1]
        return not isinstance(end, torch.cuda.Event) or bool(end.query())  # type: ignore[no-untyped-call]

    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each task, in seconds. All must be done."""
        times = [self._since(mark) for mark in self._marks]
        return list(zip(times[::2], times[1::2], strict=True))

    def _since(self, mark: float | torch.cuda.Event) -> float:
        if isinstance(mark, torch.cuda.Event) and isinstance(self._began, torch.cuda.Event):
            return float(self._began.elapsed_time(mark)) / 1e3
        assert isinstance(mark, float) and isinstance(self._began, float)
        return mark - self._began
