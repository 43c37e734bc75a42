"""Runs a schedule: each process goes through its device's list, with transfers under way beside the work.

All processes hold the same schedule; nothing else is agreed upon. What a stage computes is the caller's: a function
from its input to its output and its share of the loss. Beside this file, ``transfers`` says why no order of tasks can
deadlock, ``split_backward`` is for I and W, ``replicas`` for the sums of gradients, ``offload`` for what waits on the
host, ``stash`` for several versions of weights, and ``vocabulary`` for what shards of the vocabulary compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Schedule, Task, WeightRule
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.run.grid import Grid
from penstock.pipeline.run.offload import HostLink, Offloaded
from penstock.pipeline.run.post_validation import tentative
from penstock.pipeline.run.replicas import Replicas, holders
from penstock.pipeline.run.split_backward import Deferral
from penstock.pipeline.run.stash import Stash
from penstock.pipeline.run.transfers import Need, Routes, Transfers
from penstock.pipeline.run.vocabulary import Shard, width

#: ``forward(stage, microbatch, x)``: x is None for the first stage on the microbatch's path, and the output None for
#: the last one, unless the vocabulary is sharded; the loss is a scalar, or None where the stage adds nothing to it.
Forward = Callable[[int, int, Tensor | None], tuple[Tensor | None, Tensor | None]]

#: How many tasks before the one that needs it an offloaded activation begins to return.
RETURNING = 2


class Live(NamedTuple):
    """What is kept of a forward pass: its input, where its backward pass begins, and what W will need.

    ``weight`` is the gradient of the loss in itself: one, in its dtype; None where there is no loss. ``offloaded`` is
    what waits on the host.
    """

    x: Tensor | None
    roots: list[GradientEdge]
    weight: Tensor | None
    deferral: Deferral | None
    offloaded: Offloaded | None


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
        weights: those that forward passes read, by the same names, which are never offloaded, and of which versions are
            stashed; ``parameters`` if not given.

    Raises:
        ScheduleError: the schedule cannot run.
        UsageError: it keeps several versions of weights and splits backwards, offloads activations, or has the same
            weights on several devices; or several pipelines share a sharded vocabulary.
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
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        validate(schedule)
        require_supported(schedule, names, grid)
        self.schedule, self.grid, self.dtype, self.device = schedule, grid, dtype, device
        self.order = schedule.orders[grid.device]
        self._routes = Routes(schedule)
        grid.connect(sorted(self._routes.queues), device)
        self._replicas = Replicas(schedule, names, grid, parameters, device)
        self._split = {(task.stage, task.microbatch) for task in self.order if task.kind is Kind.W}
        here = {task.stage for task in self.order}
        self._weights = parameters if weights is None else weights
        self._held = {stage: [self._weights[n] for n in names[stage] if n in self._weights] for stage in here}
        self._link = HostLink(device)
        self._tentative = tentative(schedule)

    def step(
        self,
        forward: Forward,
        shapes: Sequence[Sequence[int]],
        collect: Callable[[], None] = lambda: None,
        *,
        update: Callable[[int], None] | None = None,
        shard: Shard | None = None,
        confirm: Callable[[], bool] | None = None,
    ) -> Step:
        """Forward and backward of all microbatches. Leaves the gradients in ``.grad``, which must be empty before.

        Args:
            forward: what a stage computes.
            shapes: of the messages of each microbatch.
            collect: called after each B and W, to take gradients elsewhere; what it leaves in the ``.grad`` of
                ``parameters`` is summed over their holders.
            update: for a schedule without a flush: called with the stage after each B, to update the stage's weights by
                the gradients of this microbatch, and to clear them.
            shard: of the vocabulary, where the schedule shards it.
            confirm: called once, when this device has done as many forwards as it can before it hears from the last
                one (see :func:`~penstock.pipeline.run.post_validation.tentative`): whether the weights that they saw
                were right. Where not, they are done again. All devices get the same answer.

        Raises:
            UsageError: there is no ``update`` or no ``shard`` for a schedule that needs it.
            PenstockError: another process is lost; the message names its rank and the task that was waited for.
        """
        if (update is None) is (self.schedule.weights is WeightRule.STASH):
            raise UsageError("weights are updated within a step by schedules without a flush, and by no others")
        if (shard is None) is bool(self.schedule.barriers):
            raise UsageError("a shard of the vocabulary is for schedules that shard it, and for no others")
        count = 0 if confirm is None else self._tentative[self.grid.device]
        first, rest = self.order[:count], self.order[count:]
        self._replicas.begin()
        attempt = _Attempt(self, forward, shapes, shard)
        attempt.run(first)
        if confirm is not None and not confirm():
            attempt.drop()
            attempt = _Attempt(self, forward, shapes, shard)
            attempt.run(first)
        attempt.run(rest, collect, update)
        attempt.transfers.finish()
        self._replicas.finish()
        self._settle(attempt.clock)
        return Step(attempt.work.loss, attempt.work.peak, attempt.clock.spans())

    def _form(self, shapes: Sequence[Sequence[int]], need: Need) -> tuple[Sequence[int], torch.dtype]:
        """The shape and dtype of a message; what shards of the vocabulary say of scores is in float32 or wider."""
        shape = shapes[need.maker.microbatch]
        if need.maker.kind not in (Kind.S, Kind.N):
            return shape, self.dtype
        numbers = width(need.maker, need.reader, self.schedule.barriers, shape[-1])
        return (*shape[:-1], numbers), torch.promote_types(self.dtype, torch.float32)

    def _settle(self, clock: _Clock) -> None:
        """Waits for the device's queue of work. A message that never comes shows there, not where it was asked for."""
        for number, task in enumerate(self.order):
            deadline = time.monotonic() + self.grid.timeout
            while not clock.done(number):
                if time.monotonic() > deadline:
                    here, patience = self.grid.device, 0.2 * self.grid.timeout
                    awaited = [(self._routes.sources[need], need.maker) for need in self._routes.read.get(task, ())]
                    source, maker = next((found for found in awaited if found[0] != here), (here, task))
                    raise self.grid.lost(self.grid.rank(source), f"its {maker}", patience=patience)
                time.sleep(1e-4)


def require_supported(schedule: Schedule, names: Sequence[Sequence[str]], grid: Grid) -> None:
    """What a runtime of these arguments refuses, before it is made.

    Raises:
        UsageError: see :class:`Runtime`.
    """
    if schedule.barriers and grid.pipelines > 1:
        raise UsageError(
            "several pipelines that share a batch have no common shards of the vocabulary",
            hint="Run one pipeline over all processes, or keep the vocabulary whole.",
        )
    if schedule.weights is WeightRule.FLUSH:
        return
    shared = [name for name, ranks in holders(schedule, names, grid).items() if len(ranks) > 1]
    if shared:
        raise UsageError(
            f"{shared[0]} is on several devices, which would update it at different times",
            hint="Without a flush, use one pipeline, one replica of each stage and an untied head; or run 1f1b, which "
            "has the order of pipedream and one update a step.",
        )
    if any(task.kind is Kind.W for order in schedule.orders for task in order):
        raise UsageError(
            "a weight gradient that is computed later would see later weights",
            hint="Without a flush, use B in place of I and W.",
        )
    if schedule.offloaded:
        raise UsageError(
            "activations wait on the host only in schedules with one version of the weights",
            hint="Offload those of 1f1b, which has the order of pipedream and one update a step.",
        )


class _Attempt:
    """The tasks of this device in a step, from the first on, until they are all done or dropped."""

    def __init__(
        self, runtime: Runtime, forward: Forward, shapes: Sequence[Sequence[int]], shard: Shard | None
    ) -> None:
        self._runtime, self._form = runtime, functools.partial(runtime._form, shapes)
        self.transfers = Transfers(runtime._routes, runtime.grid, self._form, runtime.device)
        self.work = _Work(runtime, forward, shard)
        self.clock = _Clock(runtime.device)

    def run(
        self,
        order: Sequence[Task],
        collect: Callable[[], None] = lambda: None,
        update: Callable[[int], None] | None = None,
    ) -> None:
        """Does the next tasks."""
        runtime, work, transfers = self._runtime, self.work, self.transfers
        transfers.expect(order)
        for number, task in enumerate(order):
            given = [transfers.take(need) for need in runtime._routes.read.get(task, ())]
            work.call_back(order[number : number + 1 + RETURNING])
            self.clock.start()
            made = work.run(task, given)
            self.clock.stop()
            for need in runtime._routes.made.get(task, ()):
                assert made is not None
                # S has more for some of its readers than for others.
                transfers.give(need, made[..., : self._form(need)[0][-1]] if task.kind is Kind.S else made)
            if task.kind in (Kind.B, Kind.W):
                collect()
                runtime._replicas.done(task.stage)
                if update is not None:
                    update(task.stage)
                    work.stashes[task.stage].updated()

    def drop(self) -> None:
        """Forgets the first tasks of all devices and what they have sent."""
        runtime = self._runtime
        firsts = zip(runtime.schedule.orders, runtime._tentative, strict=True)
        self.transfers.drop({task for order, count in firsts for task in order[:count]})


class _Work:
    """The computations of one step, and what is held between them."""

    def __init__(self, runtime: Runtime, forward: Forward, shard: Shard | None) -> None:
        self._runtime, self._forward, self._shard = runtime, forward, shard
        self._live: dict[tuple[int, int], Live] = {}
        stashing = runtime.schedule.weights is WeightRule.STASH
        self.stashes = {stage: Stash(held) for stage, held in runtime._held.items()} if stashing else {}
        self.loss = torch.zeros((), dtype=torch.promote_types(runtime.dtype, torch.float32), device=runtime.device)
        self._leaving: Offloaded | None = None
        self.peak = 0

    def run(self, task: Task, given: Sequence[Tensor]) -> Tensor | None:
        """Does ``task`` with what it was given; returns what others wait for. What the task before has offloaded leaves
        beside it."""
        leaving, self._leaving = self._leaving, None
        made = self._run(task, given)
        if leaving is not None:
            leaving.leave()
        return made

    def _run(self, task: Task, given: Sequence[Tensor]) -> Tensor | None:
        if task.kind in VOCABULARY:
            return self._run_shard(task, given)
        key = task.stage, task.microbatch
        match task.kind:
            case Kind.F:
                return self._run_forward(key, _sum(given))
            case Kind.I:
                live = self._live[key]
                self._live[key] = Live(None, [], None, live.deferral, None)
                return self._run_backward(task, live, given)
            case Kind.W:
                deferral = self._live.pop(key).deferral
                assert deferral is not None
                deferral.run()
                return None
            case _:
                return self._run_backward(task, self._live.pop(key), given)

    def call_back(self, tasks: Sequence[Task]) -> None:
        """Starts the return of what the next tasks need from the host."""
        for task in tasks:
            live = self._live.get((task.stage, task.microbatch))
            if live is not None and live.offloaded is not None and task.kind in (Kind.I, Kind.B):
                live.offloaded.call_back()

    def _run_forward(self, key: tuple[int, int], x: Tensor | None) -> Tensor | None:
        runtime, (stage, _) = self._runtime, key
        deferral = Deferral() if key in runtime._split else None
        away = key in runtime.schedule.offloaded
        offloaded = Offloaded(runtime._link, runtime._weights.values()) if away else None
        if x is not None:
            x = x.detach().requires_grad_()
        with contextlib.ExitStack() as stack:
            if offloaded is not None:
                stack.enter_context(offloaded)
            if stage in self.stashes:
                stack.enter_context(self.stashes[stage].recording())
            if deferral is not None:
                stack.enter_context(deferral)
            output, loss = self._forward(*key, x)
        # Not the output itself: its values are the next stage's, and only its place in the graph is needed here.
        roots = [get_gradient_edge(root) for root in (output, loss) if root is not None]
        self._live[key] = Live(x, roots, None if loss is None else torch.ones_like(loss), deferral, offloaded)
        self._leaving = offloaded
        self.peak = max(self.peak, len(self._live))
        if loss is not None:
            self.loss = self.loss + loss.detach()
        return None if output is None else output.detach()

    def _run_backward(self, task: Task, live: Live, given: Sequence[Tensor]) -> Tensor | None:
        if live.offloaded is not None:
            live.offloaded.arrive()
        last = task.stage == self._runtime.schedule.path(task.microbatch)[-1]
        if self._shard is not None and last:
            gradient: Tensor | None = self._shard.hidden_gradient(task.microbatch, given).to(self._runtime.dtype)
        else:
            gradient = _sum(given)
        torch.autograd.backward(live.roots, [g for g in (gradient, live.weight) if g is not None])
        if live.x is None:
            return None
        return torch.zeros_like(live.x) if live.x.grad is None else live.x.grad  # a stage may ignore its input

    def _run_shard(self, task: Task, given: Sequence[Tensor]) -> Tensor | None:
        shard, microbatch = self._shard, task.microbatch
        assert shard is not None
        match task.kind:
            case Kind.E:
                return shard.embed(microbatch).to(self._runtime.dtype)
            case Kind.S:
                return shard.score(microbatch, *given)
            case Kind.N:
                return shard.normalize(microbatch, given)
            case Kind.T:
                loss, gradient = shard.differentiate(microbatch, given)
                if task.replica == 0:  # all shards have the same
                    self.loss = self.loss + loss
                return gradient
            case _:
                shard.embedded(microbatch, *given)
                return None


def _sum(tensors: Sequence[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, tensors) if tensors else None


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
