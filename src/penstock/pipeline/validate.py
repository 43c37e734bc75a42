"""Whether a schedule can run: complete, consistent with the dependencies, and free of deadlock."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.pipeline.ir import Kind, Schedule, ScheduleError, Task

# How far one microbatch has come on one stage.
_NOTHING, _FORWARD, _INPUT, _DONE = range(4)
_BEFORE = {Kind.F: _NOTHING, Kind.I: _FORWARD, Kind.B: _FORWARD, Kind.W: _INPUT}
_AFTER = {Kind.F: _FORWARD, Kind.I: _INPUT, Kind.B: _DONE, Kind.W: _DONE}


def validate(schedule: Schedule) -> None:
    """Checks a schedule in time linear in its tasks.

    For each stage on the path of each microbatch there must be one F followed, on the same replica, by one B or by an I
    and then a W. All devices running their lists in order must come to an end.

    Raises:
        ScheduleError: with the device, the task, and for a deadlock the cycle of tasks.
    """
    _check_placement(schedule)
    _check_tasks(schedule)
    for _ in walk(schedule):
        pass


def walk(schedule: Schedule) -> Iterator[tuple[int, Task]]:
    """Yields (device, task) in an order that keeps every device's list and every dependency between stages.

    Each device runs until it meets a task whose input is missing, and goes on once that has been made.

    Raises:
        ScheduleError: the devices wait for each other; the message names the cycle.
    """
    m, stages = schedule.microbatches, schedule.stages
    before, after = schedule.neighbours
    done = bytearray(2 * stages * m)  # outputs: forward of (stage, microbatch), then backward of them
    waiting: dict[int, int] = {}  # output -> the device that waits for it
    positions = [0] * schedule.devices
    runnable = list(range(schedule.devices))[::-1]
    while runnable:
        device = runnable.pop()
        order = schedule.orders[device]
        for position in range(positions[device], len(order)):
            task = order[position]
            kind, stage, microbatch, _ = task
            if kind is Kind.F:
                output = stage * m + microbatch
                needed = before[output]
            elif kind is Kind.W:
                yield device, task
                continue
            else:
                output = (stages + stage) * m + microbatch
                needed = after[output - stages * m]
                if needed >= 0:
                    needed += stages * m
            if needed >= 0 and not done[needed]:
                positions[device] = position
                waiting[needed] = device
                break
            yield device, task
            done[output] = 1
            if output in waiting:
                runnable.append(waiting.pop(output))
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


def _out_of_order(task: Task, device: int, state: int) -> ScheduleError:
    if state >= _AFTER[task.kind] or (task.kind is Kind.B and state == _INPUT):
        what = f"{task} comes after that work was done: every task must come once"
    else:
        before = Kind.I if task.kind is Kind.W and state == _FORWARD else Kind.F
        what = f"{task} comes without {task._replace(kind=before)} before it"
    return ScheduleError(what, device=device)


def _deadlock(schedule: Schedule, positions: list[int]) -> ScheduleError:
    """The error that names the cycle of waiting tasks, found by following each device's first unfinished task."""
    m = schedule.microbatches
    before, after = schedule.neighbours
    producers = {}
    for device, order in enumerate(schedule.orders):
        for task in order[positions[device] :]:
            if task.kind is not Kind.W:
                producers[task.kind is Kind.F, task.stage, task.microbatch] = device, task
    device = next(d for d, order in enumerate(schedule.orders) if positions[d] < len(order))
    seen: dict[int, str] = {}
    while device not in seen:
        head = schedule.orders[device][positions[device]]
        forward = head.kind is Kind.F
        source = (before if forward else after)[head.stage * m + head.microbatch] // m
        wanted = (forward, source, head.microbatch)
        if wanted not in producers:
            return ScheduleError(f"{head} waits for a task that no device has", device=device)
        producer, task = producers[wanted]
        seen[device] = f"{head} on device {device} waits for {task} of device {producer}"
        if task != schedule.orders[producer][positions[producer]]:
            seen[device] += f", which comes after {schedule.orders[producer][positions[producer]]}"
        device = producer
    cycle = list(seen.values())[list(seen).index(device) :]
    return ScheduleError("deadlock: " + "; ".join(cycle), device=device, hint="Swap one of these tasks with the next.")
