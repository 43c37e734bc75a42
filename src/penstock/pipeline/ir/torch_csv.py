"""The CSV format of ``torch.distributed.pipelining``: a line for each device, a cell such as ``2F0`` for each task.

PyTorch's runtime and torchtitan (``pipeline_parallel_schedule_csv``) read it in their format "compute_only".
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import Kind, Schedule, ScheduleError, Task, WeightRule
from penstock.pipeline.ir.validate import validate

_CELL = re.compile(r"(\d{1,9})([FIWB])(\d{1,9})")


def to_csv(schedule: Schedule) -> str:
    """The schedule as CSV.

    Raises:
        UsageError: it has replicas, stashed weights, offloaded activations, paths or a sharded vocabulary, for which
            the format has no word.
    """
    if schedule.paths:
        raise UsageError(
            "PyTorch's runtime sends every microbatch through all stages in order, and this schedule does not",
            hint="Export a policy of pipeline.schedule.",
        )
    if schedule.offloaded:
        raise UsageError(
            "PyTorch's CSV cannot say which activations are offloaded",
            hint="Export the schedule without that transform.",
        )
    if schedule.barriers:
        raise UsageError(
            "PyTorch's CSV has no word for the passes of a sharded vocabulary",
            hint="Export the schedule without that transform.",
        )
    if schedule.weights is not WeightRule.FLUSH:
        raise UsageError(
            "PyTorch's runtime keeps one version of the weights, and this schedule stashes several",
            hint="Export 1f1b, which has the order of pipedream and one update a step.",
        )
    if schedule.replicas > 1:
        raise UsageError(
            "PyTorch's CSV cannot say that a stage has several replicas",
            hint="Export a schedule with one copy of the model, such as zb_h1, v_zb or hanayo.",
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(str, order) for order in schedule.orders])
    return text.getvalue()


def from_csv(text: str, source: str) -> Schedule:
    """Reads and validates a schedule; ``source`` names it in errors. Empty cells, PyTorch's idle steps, are dropped.

    Raises:
        UsageError: a cell is no task, a task is missing or out of order, or the devices wait for each other in a cycle;
            the message names the line.
    """
    rows = list(csv.reader(io.StringIO(text)))
    orders = tuple(tuple(_tasks(row, f"{source}, line {number}")) for number, row in enumerate(rows, 1))
    homes: dict[int, int] = {}
    for device, order in enumerate(orders):
        for task in order:
            home = homes.setdefault(task.stage, device)
            if home != device:
                raise UsageError(
                    f"{source}, line {device + 1}: {task} is of stage {task.stage}, which line {home + 1} has already",
                    hint="Each line is one device, and each stage belongs to one of them.",
                )
    stages = _count((task.stage for order in orders for task in order), "stage", source)
    microbatches = _count((task.microbatch for order in orders for task in order), "microbatch", source)
    schedule = Schedule(tuple((homes[stage],) for stage in range(stages)), orders, microbatches)
    try:
        validate(schedule)
    except ScheduleError as error:
        line = source if error.device is None else f"{source}, line {error.device + 1}"
        raise UsageError(f"{line}: {error.fault}", hint="Device 0 is line 1, device 1 is line 2, and so on.") from error
    return schedule


def _tasks(row: list[str], where: str) -> Iterable[Task]:
    for column, cell in enumerate(row, 1):
        if not cell.strip():
            continue
        found = _CELL.fullmatch(cell.strip())
        if found is None:
            raise UsageError(
                f"{where}, column {column}: {cell!r} is no task",
                hint="A task is a stage, F, I, W or B, and a microbatch, such as 2F0; transfers are not written.",
            )
        stage, kind, microbatch = found.groups()
        yield Task(Kind[kind], int(stage), int(microbatch))


def _count(numbers: Iterable[int], what: str, source: str) -> int:
    """How many there are, if they are numbered from 0 without a gap."""
    seen = set(numbers)
    if not seen:
        raise UsageError(f"{source} holds no task")
    missing = next(number for number in range(len(seen) + 1) if number not in seen)
    if missing < len(seen):
        raise UsageError(f"{source}: no line has a task of {what} {missing}, though there is a {what} {max(seen)}")
    return len(seen)
