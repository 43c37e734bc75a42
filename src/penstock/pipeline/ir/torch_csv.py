"""The CSV format of ``torch.distributed.pipelining``: a line for each device, a cell such as ``2F0`` for each task.

PyTorch's runtime and torchtitan (``pipeline_parallel_schedule_csv``) read it in their format "compute_only". A pair of
F and B that overlap is ``(0F7;7B3)OVERLAP_F_B``. A stage with several replicas is beyond PyTorch: here ``r1:2F0`` is on
replica 1, which PyTorch refuses. In the format "compute_comms", cells also say what is sent, received, gathered and
reduced (``0SEND_F0``, ``0UNSHARD``); that follows from the order and the placement, and is dropped here.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import Kind, Schedule, ScheduleError, Task, WeightRule
from penstock.pipeline.ir.validate import validate

_TASK = r"(?:r(\d{1,9}):)?(\d{1,9})([FIWB])(\d{1,9})"
_CELL = re.compile(_TASK)
_PAIR = re.compile(rf"\({_TASK};{_TASK}\)OVERLAP_F_B")
_COMMUNICATION = re.compile(r"\d{1,9}(?:(?:SEND|RECV)_[FB]\d{1,9}|UNSHARD|RESHARD|REDUCE_GRAD)")


def to_csv(schedule: Schedule) -> str:
    """The schedule as CSV.

    Raises:
        UsageError: it has stashed weights, offloaded activations, paths or a sharded vocabulary, for which the format
            has no word.
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
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_cells(schedule, device) for device in range(schedule.devices))
    return text.getvalue()


def _cells(schedule: Schedule, device: int) -> list[str]:
    """A device's line."""
    cells: list[str] = []
    paired = dict(schedule.pairs(device))
    backwards = set(paired.values())
    for task in schedule.orders[device]:
        if task in paired:
            cells.append(f"({_word(task)};{_word(paired[task])})OVERLAP_F_B")
        elif task not in backwards:
            cells.append(_word(task))
    return cells


def _word(task: Task) -> str:
    return f"{f'r{task.replica}:' if task.replica else ''}{task._replace(replica=0)}"


def from_csv(text: str, source: str) -> Schedule:
    """Reads and validates a schedule; ``source`` names it in errors. Empty cells, PyTorch's idle steps, are dropped.

    Raises:
        UsageError: a cell is no task, a task is missing or out of order, or the devices wait for each other in a cycle;
            the message names the line.
    """
    rows = list(csv.reader(io.StringIO(text)))
    overlapped: set[Task] = set()
    orders = tuple(tuple(_tasks(row, f"{source}, line {number}", overlapped)) for number, row in enumerate(rows, 1))
    homes: dict[tuple[int, int], int] = {}
    for device, order in enumerate(orders):
        for task in order:
            home = homes.setdefault((task.stage, task.replica), device)
            if home != device:
                raise UsageError(
                    f"{source}, line {device + 1}: {task} is of stage {task.stage}, which line {home + 1} has already",
                    hint="Each line is one device, and each stage belongs to one of them.",
                )
    stages = _count((task.stage for order in orders for task in order), "stage", source)
    microbatches = _count((task.microbatch for order in orders for task in order), "microbatch", source)
    replicas = [
        _count((r for s, r in homes if s == stage), f"stage {stage}, replica", source) for stage in range(stages)
    ]
    placement = tuple(tuple(homes[s, r] for r in range(count)) for s, count in enumerate(replicas))
    schedule = Schedule(placement, orders, microbatches, overlapped=frozenset(overlapped))
    try:
        validate(schedule)
    except ScheduleError as error:
        line = source if error.device is None else f"{source}, line {error.device + 1}"
        raise UsageError(f"{line}: {error.fault}", hint="Device 0 is line 1, device 1 is line 2, and so on.") from error
    return schedule


def _tasks(row: list[str], where: str, overlapped: set[Task]) -> Iterable[Task]:
    """The tasks of a line; adds the forwards of its pairs to ``overlapped``."""
    for column, cell in enumerate(map(str.strip, row), 1):
        if not cell or _COMMUNICATION.fullmatch(cell):
            continue
        if pair := _PAIR.fullmatch(cell):
            first, second = _task(*pair.groups()[:4]), _task(*pair.groups()[4:])
            overlapped.add(first)
            yield from (first, second)
        elif found := _CELL.fullmatch(cell):
            yield _task(*found.groups())
        else:
            raise UsageError(
                f"{where}, column {column}: {cell!r} is no task",
                hint="A task is a stage, F, I, W or B, and a microbatch, such as 2F0; a pair is (0F7;7B3)OVERLAP_F_B.",
            )


def _task(replica: str | None, stage: str, kind: str, microbatch: str) -> Task:
    return Task(Kind[kind], int(stage), int(microbatch), int(replica or 0))


def _count(numbers: Iterable[int], what: str, source: str) -> int:
    """How many there are, if they are numbered from 0 without a gap."""
    seen = set(numbers)
    if not seen:
        raise UsageError(f"{source} holds no task")
    missing = next(number for number in range(len(seen) + 1) if number not in seen)
    if missing < len(seen):
        raise UsageError(f"{source}: no line has a task of {what} {missing}, though there is a {what} {max(seen)}")
    return len(seen)
