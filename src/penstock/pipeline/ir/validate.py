"""Whether a schedule can run: complete, consistent with the dependencies, and free of deadlock."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator

from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Schedule, ScheduleError, Task

# How far one microbatch has come on one stage.
_NOTHING, _FORWARD, _INPUT, _DONE = range(4)
_BEFORE = {Kind.F: _NOTHING, Kind.I: _FORWARD, Kind.B: _FORWARD, Kind.W: _INPUT}
_AFTER = {Kind.F: _FORWARD, Kind.I: _INPUT, Kind.B: _DONE, Kind.W: _DONE}


def validate(schedule: Schedule) -> None:
    """Checks a schedule in time linear in its tasks.

    For each stage on the path of each microbatch there must be one F followed, on the same replica, by one B or by an I
    and then a W; where the vocabulary is sharded, each device must have each of its passes for each microbatch once. An
    overlapped forward must have a backward beside it that does not wait for it.
    All devices running their lists in order must come to an end.

    Raises:
        ScheduleError: with the device, the task, and for a deadlock the cycle of tasks.
    """
    _check_placement(schedule)
    _check_tasks(schedule)
    _check_shards(schedule)
    _check_pairs(schedule)
    for _ in walk(schedule):
        pass


def walk(schedule: Schedule) -> Iterator[tuple[int, Task]]:
    """Yields (device, task) in an order that keeps every device's list and every dependency between stages.

    Each device runs until it meets a task whose input is missing, and goes on once that has been made. The two of a
    pair follow each other at once.

    Raises:
        ScheduleError: the devices wait for each other; the message names the cycle.
    """
    missing = schedule.makers.copy()  # for each output, the tasks that it still waits for
    waiting: defaultdict[int, list[int]] = defaultdict(list)  # output -> the devices that wait for it
    positions = [0] * schedule.devices
    runnable = list(range(schedule.devices))[::-1]
    overlapped = schedule.overlapped
    while runnable:
        device = runnable.pop()
        order = schedule.orders[device]
        for position in range(positions[device], len(order)):
            task = order[position]
            needed = schedule.read_by(task)
            if overlapped and task in overlapped and not (needed >= 0 and missing[needed]):
                needed = schedule.read_by(order[position + 1])
            if needed >= 0 and missing[needed]:
                positions[device] = position
                waiting[needed].append(device)
                break
            yield device, task
            output = schedule.made_by(task)
            if output >= 0:
                missing[output] -= 1
                if not missing[output]:
                    runnable += waiting.pop(output, ())
        else:
            positions[device] = len(order)
    if any(position < len(order) for position, order in zip(positions, schedule.orders, strict=True)):
        raise _deadlock(schedule, positions)


def _check_placement(schedule: Schedule) -> None:
    if not schedule.placement or not schedule.orders or schedule.microbatches < 1:
        raise ScheduleError(
            f"a schedule needs stages, devices and microbatches; this one has {schedule.stages}, {schedule.devices} "
            f"and {schedule.microbatches}"
        )
    for stage, devices in enumerate(schedule.placement):
        if not devices or not all(0 <= device < schedule.devices for device in devices):
            raise ScheduleError(f"stage {stage} is placed on {list(devices)}, of devices 0 to {schedule.devices - 1}")
    if schedule.paths and len(schedule.paths) != schedule.microbatches:
        raise ScheduleError(f"there are {len(schedule.paths)} paths for {schedule.microbatches} microbatches")
    for microbatch, path in enumerate(schedule.paths):
        if not path or len(set(path)) < len(path) or not set(path) <= set(range(schedule.stages)):
            raise ScheduleError(
                f"the path of microbatch {microbatch} passes {list(path)}: it needs one or more of the stages 0 to "
                f"{schedule.stages - 1}, each at most once"
            )


def _check_tasks(schedule: Schedule) -> None:
    """Every task once, on its device, F before I or B and I before W."""
    m = schedule.microbatches
    states = bytearray(schedule.stages * m)
    homes = [0] * (schedule.stages * m)  # the replica that ran the forward
    passed = {stage * m + microbatch for microbatch, path in enumerate(schedule.paths) for stage in path}
    for device, order in enumerate(schedule.orders):
        for task in order:
            kind, stage, microbatch, replica = task
            if kind in VOCABULARY:
                continue
            if not (0 <= stage < schedule.stages and 0 <= microbatch < m):
                raise ScheduleError(
                    f"{task} is of no stage (0 to {schedule.stages - 1}) or microbatch (0 to {m - 1})", device=device
                )
            if not 0 <= replica < len(schedule.placement[stage]) or schedule.placement[stage][replica] != device:
                raise ScheduleError(
                    f"{task} is not its own: stage {stage} is placed on {list(schedule.placement[stage])}",
                    device=device,
                )
            key = stage * m + microbatch
            if schedule.paths and key not in passed:
                raise ScheduleError(f"{task} is not on the path of its microbatch", device=device)
            state = states[key]
            if state != _BEFORE[kind] or (state and homes[key] != replica):
                raise _out_of_order(task, device, state)
            states[key] = _AFTER[kind]
            homes[key] = replica
    for key, state in enumerate(states):
        if state != _DONE and (key in passed or not schedule.paths):
            stage, microbatch = divmod(key, m)
            missing = {_NOTHING: Kind.F, _FORWARD: Kind.B, _INPUT: Kind.W}[state]
            home = schedule.placement[stage][homes[key]]
            raise ScheduleError(f"{Task(missing, stage, microbatch, homes[key])} is missing", device=home)


def _check_shards(schedule: Schedule) -> None:
    """Every pass of every shard of the vocabulary once, on its device. Their order is a matter of dependencies."""
    for device, order in enumerate(schedule.orders):
        passes = [task for task in order if task.kind in VOCABULARY]
        wanted = {task for k in range(schedule.microbatches) for task in schedule.shard_tasks(device, k)}
        for task, count in Counter(passes).items():
            if count > 1:
                raise ScheduleError(f"{task} comes {count} times: every task must come once", device=device)
            if task not in wanted:
                raise ScheduleError(f"{task} is no pass of its shard of the vocabulary", device=device)
        if len(passes) < len(wanted):
            raise ScheduleError(f"{min(wanted.difference(passes))} is missing", device=device)


def _check_pairs(schedule: Schedule) -> None:
    """Every overlapped forward has a backward after it that may run beside it."""
    found = 0
    for device, order in enumerate(schedule.orders):
        for task, following in itertools.zip_longest(order, order[1:]):
            if task not in schedule.overlapped:
                continue
            found += 1
            if task.kind is not Kind.F or following is None or following.kind not in (Kind.I, Kind.B):
                raise ScheduleError(f"{task} overlaps with no backward after it, but with {following}", device=device)
            if task[1:] == following[1:]:
                raise ScheduleError(f"{following} waits for {task}, and cannot overlap with it", device=device)
    if found < len(schedule.overlapped):
        raise ScheduleError(f"{len(schedule.overlapped) - found} overlapped forwards are on no device")


def _out_of_order(task: Task, device: int, state: int) -> ScheduleError:
    if state >= _AFTER[task.kind] or (task.kind is Kind.B and state == _INPUT):
        what = f"{task} comes after that work was done: every task must come once"
    else:
        before = Kind.I if task.kind is Kind.W and state == _FORWARD else Kind.F
        what = f"{task} comes without {task._replace(kind=before)} before it"
    return ScheduleError(what, device=device)


def _deadlock(schedule: Schedule, positions: list[int]) -> ScheduleError:
    """The error that names the cycle of waiting tasks, found by following each device's first unfinished task."""
    producers: dict[int, tuple[int, Task]] = {}  # of an output, a task that has not run
    for device, order in enumerate(schedule.orders):
        for task in order[positions[device] :]:
            producers[schedule.made_by(task)] = device, task
    device = next(d for d, order in enumerate(schedule.orders) if positions[d] < len(order))
    seen: dict[int, str] = {}
    while device not in seen:
        head = schedule.orders[device][positions[device]]
        wanted = schedule.read_by(head)
        if head in schedule.overlapped and wanted not in producers:
            head = schedule.orders[device][positions[device] + 1]
            wanted = schedule.read_by(head)
        if wanted not in producers:
            return ScheduleError(f"{head} waits for a task that no device has", device=device)
        producer, task = producers[wanted]
        seen[device] = f"{head} on device {device} waits for {task} of device {producer}"
        if task != schedule.orders[producer][positions[producer]]:
            seen[device] += f", which comes after {schedule.orders[producer][positions[producer]]}"
        device = producer
    cycle = list(seen.values())[list(seen).index(device) :]
    return ScheduleError("deadlock: " + "; ".join(cycle), device=device, hint="Swap one of these tasks with the next.")
