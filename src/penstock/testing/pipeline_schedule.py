"""The law of ``pipeline.schedule``.

Bugs that its clauses are there to catch:

- complete: a task that is lost, doubled, on another device than its stage or on another replica than its forward.
- deadlock: an order in which devices wait for each other, at any numbers of devices and microbatches.
- refusal: numbers that are named as working, and do not; no refusal of none.
- simulation: a time that is not the earliest one, with latency and bandwidth of each link forgotten or counted twice; a
  peak that counts activations at the wrong moments.
- versions: weights that are newer than those of the forward, or counted when they are held no longer.
- several processes: gradients that are missing, doubled, or of other weights; more activations held than simulated.
- training: losses of other tokens or weights, updates by other gradients than those of one device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Schedule, Task, WeightRule
from penstock.pipeline.ir.validate import validate
from penstock.pipeline.ir.versions import peak_versions, versions
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.simulator import Costs, Link, Simulation, simulate
from penstock.testing.enrolled import P, rebuilt
from penstock.testing.pipeline_runtime import check_on_ranks
from penstock.testing.pipeline_training import check_trains
from penstock.testing.refusals import refused

#: Numbers of devices and of microbatches.
SHAPES = ((1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (3, 9), (4, 4), (4, 8), (5, 7), (8, 16))


def check(policy: PipelineSchedule) -> None:
    """Asserts the law of ``pipeline.schedule``, with two and three processes."""
    check_orders(policy)
    for size in (2, 3):
        check_on_ranks({policy.policy_name: policy}, size, microbatches=5)
    check_trains({policy.policy_name: policy}, 2)


def check_orders(
    policy: PipelineSchedule,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    draws: int = 20,
    most: tuple[int, int] = (9, 24),
) -> None:
    """What can be said without running: for many numbers of devices and microbatches, ``shapes`` and so many that are
    drawn, up to ``most``, and variants of the options."""
    candidates = list(variants(policy))
    for devices, microbatches in shapes:
        for variant in candidates:
            check_schedule(variant, devices, microbatches)
    draw = numpy_generator(0, "testing/pipeline.schedule")
    for _ in range(draws):
        variant = candidates[draw.integers(len(candidates))]
        check_schedule(variant, int(draw.integers(1, most[0] + 1)), int(draw.integers(1, most[1] + 1)))
    for devices, microbatches in ((0, 4), (4, 0), (-1, 1)):
        with refused(UsageError, "does nothing"):
            policy.build(devices, microbatches)


def check_schedule(policy: PipelineSchedule, devices: int, microbatches: int) -> None:
    """Asserts the law for one pair of numbers. Where the policy refuses, for the pair that the refusal names."""
    try:
        schedule = policy.build(devices, microbatches)
    except RefusalError as refusal:
        assert (refusal.devices, refusal.microbatches) != (devices, microbatches)
        assert refusal.devices >= devices
        assert refusal.microbatches >= microbatches
        devices, microbatches = refusal.devices, refusal.microbatches
        schedule = policy.build(devices, microbatches)
    assert (schedule.devices, schedule.microbatches) == (devices, microbatches)
    assert rebuilt(policy).build(devices, microbatches) == schedule, "the schedule depends on more than its options"
    check_complete(schedule)
    assert run_by_rounds(schedule) == [], "deadlock"
    validate(schedule)
    check_simulation(schedule)
    check_versions(schedule)


def built(policy: PipelineSchedule, devices: int, microbatches: int) -> Schedule:
    """The schedule for these numbers or, where the policy refuses them, for those that it names."""
    try:
        return policy.build(devices, microbatches)
    except RefusalError as refusal:
        return policy.build(refusal.devices, refusal.microbatches)


def variants(policy: P) -> Iterator[P]:
    """The policy, and the policy with each of its whole-number options one larger."""
    yield policy
    for name, field in type(policy).model_fields.items():
        if field.annotation is int:
            yield policy.model_copy(update={name: getattr(policy, name) + 1})


def check_complete(schedule: Schedule) -> None:
    """Each device has the same number of stages; every stage on the path of a microbatch has F and either B, or I and
    W, once, on one replica; and each task is on its stage's device. Each device has each pass of a sharded vocabulary
    once for each microbatch."""
    done: dict[tuple[int, int], list[Task]] = {}
    for device, order in enumerate(schedule.orders):
        for microbatch in range(schedule.microbatches):
            shards = [task for task in order if task.kind in VOCABULARY and task.microbatch == microbatch]
            assert {task.replica for task in shards} <= {device}
            found = "".join(task.kind.name for task in sorted(shards))
            assert found == ("", "ESTG", "ESTG", "ESNTG")[schedule.barriers]
        for task in (task for task in order if task.kind not in VOCABULARY):
            assert schedule.placement[task.stage][task.replica] == device, f"{task} is on device {device}"
            done.setdefault((task.stage, task.microbatch), []).append(task)
    cells = {(stage, microbatch) for microbatch in range(schedule.microbatches) for stage in schedule.path(microbatch)}
    assert done.keys() == cells
    for tasks in done.values():
        assert sorted(task.kind for task in tasks) in ([Kind.F, Kind.B], [Kind.F, Kind.I, Kind.W])
        assert len({task.replica for task in tasks}) == 1
    homes = [device for devices in schedule.placement for device in devices]
    assert len({homes.count(device) for device in range(schedule.devices)}) == 1


def needs(schedule: Schedule, task: Task, done: set[tuple[Kind, int, int]]) -> bool:
    """Whether the outputs that ``task`` reads are among those of ``done``, by definition."""
    _, stage, microbatch, _ = task
    path = list(schedule.path(microbatch))

    def shards(kind: Kind) -> bool:
        return all((kind, device, microbatch) in done for device in range(schedule.devices))

    match task.kind:
        case Kind.E:
            return True
        case Kind.S:
            return (Kind.F, path[-1], microbatch) in done
        case Kind.N:
            return shards(Kind.S)
        case Kind.T:
            return shards(Kind.N if schedule.barriers == 3 else Kind.S)
        case Kind.G:
            return any((kind, path[0], microbatch) in done for kind in (Kind.I, Kind.B))
    here = {kind for kind in Kind if (kind, stage, microbatch) in done}
    place = path.index(stage)
    if task.kind is Kind.F:
        return (place == 0 and (not schedule.barriers or shards(Kind.E))) or (
            Kind.F,
            path[place - 1],
            microbatch,
        ) in done
    if task.kind is Kind.W:
        return Kind.I in here
    if stage == path[-1]:
        above = not schedule.barriers or shards(Kind.S if schedule.barriers == 1 else Kind.T)
    else:
        above = any((kind, path[place + 1], microbatch) in done for kind in (Kind.I, Kind.B))
    return Kind.F in here and above


def run_by_rounds(schedule: Schedule) -> list[Task]:
    """Runs the schedule by brute force, round after round over all devices; the tasks that never got their turn."""
    done: set[tuple[Kind, int, int]] = set()
    queues = [list(order) for order in schedule.orders]
    moved = True
    while moved:
        moved = False
        for queue in queues:
            while queue and all(needs(schedule, task, done) for task in together(schedule, queue)):
                now = together(schedule, queue)
                del queue[: len(now)]
                done |= {(t.kind, t.replica if t.kind in VOCABULARY else t.stage, t.microbatch) for t in now}
                moved = True
    return [task for queue in queues for task in queue]


def together(schedule: Schedule, queue: Sequence[Task]) -> Sequence[Task]:
    """What a device begins next: one task, or an overlapped pair."""
    return queue[: 2 if queue[0] in schedule.overlapped else 1]


def check_simulation(schedule: Schedule) -> None:
    """The simulated times are the earliest that order and dependencies allow, and the peaks are those of a count."""
    stages = range(schedule.stages)
    costs = Costs(
        forward=tuple(3.0 + stage % 3 for stage in stages),
        input_grad=tuple(4.0 - stage % 2 for stage in stages),
        weight_grad=tuple(1.0 + stage % 4 for stage in stages),
        activation=tuple(2.0 + stage % 2 for stage in stages),
        deferred=tuple(1.0 for _ in stages),
        weights=tuple(1.0 for _ in stages),
        shards={Kind.S: 2.0, Kind.N: 0.5, Kind.T: 1.5},
        message=3.0,
        link=Link(latency=0.5, bandwidth=12.0),
        links={(0, 1): Link(latency=1.25), (1, 0): Link(latency=0.25, bandwidth=1.5)},
        overlap=0.75,
    )
    simulation = simulate(schedule, costs)
    check_earliest(simulation)
    counted = [count_peak(simulation, device) for device in range(schedule.devices)]
    assert simulation.peak_activations == counted, f"the peaks are {simulation.peak_activations}, counted {counted}"


def check_earliest(simulation: Simulation) -> None:
    """Every task starts exactly when its device is free and its input has come, and takes its time.

    Those of an overlapped pair do when both inputs have come, and what they make is there at the end of both.
    """
    schedule, costs = simulation.schedule, simulation.costs
    ends: dict[tuple[bool, int, int], tuple[float, int]] = {}
    shards: dict[tuple[Kind, int], list[float]] = defaultdict(list)
    for device, order in enumerate(schedule.orders):
        own = simulation.ends[device]
        made_at = [
            following if task in schedule.overlapped else end
            for task, end, following in zip(order, own, [*own, 0.0][1:], strict=True)
        ]
        for task, end in zip(order, made_at, strict=True):
            if task.kind in VOCABULARY:
                shards[task.kind, task.microbatch].append(end)
            elif task.kind is not Kind.W:
                ends[task.kind is Kind.F, task.stage, task.microbatch] = end, device

    def delay(source: int, target: int) -> float:
        """Of a message, by definition."""
        link = costs.links.get((source, target), costs.link)
        return 0.0 if source == target else link.latency + costs.message / link.bandwidth

    def came_from(kind: Kind, microbatch: int, device: int) -> float:
        """When what all shards make is on ``device``: after the last of them, by the longest way."""
        farthest = max(delay(source, device) for source in range(schedule.devices))
        return max(shards[kind, microbatch]) + farthest if schedule.barriers else 0.0

    def came_to(task: Task, device: int) -> float:
        """When what ``task`` reads is there."""
        path = list(schedule.path(task.microbatch))
        forward = task.kind in (Kind.F, Kind.S)
        if task.kind in (Kind.W, Kind.E):
            return 0.0
        if task.kind in (Kind.N, Kind.T):
            kind = Kind.N if task.kind is Kind.T and schedule.barriers == 3 else Kind.S
            return came_from(kind, task.microbatch, device)
        if task.kind in (Kind.S, Kind.G):
            source = path[-1] if forward else path[0]
        else:
            place = path.index(task.stage) + (-1 if forward else 1)
            if not 0 <= place < len(path):
                kind = Kind.E if forward else Kind.S if schedule.barriers == 1 else Kind.T
                return came_from(kind, task.microbatch, device)
            source = path[place]
        made, where = ends[forward, source, task.microbatch]
        return made + delay(where, device)

    def duration(task: Task) -> float:
        """Of its kind on its stage, by definition."""
        if task.kind in VOCABULARY:
            return costs.shards.get(task.kind, 0.0)
        parts = {Kind.F: (costs.forward,), Kind.I: (costs.input_grad,), Kind.W: (costs.weight_grad,)}
        return sum(part[task.stage] for part in parts.get(task.kind, (costs.input_grad, costs.weight_grad)))

    for device, order in enumerate(schedule.orders):
        free = 0.0
        for place, (start, end) in enumerate(zip(simulation.starts[device], simulation.ends[device], strict=True)):
            task, second = order[place], place and order[place - 1] in schedule.overlapped
            now = () if second else together(schedule, order[place:])
            assert start == max([free, *(came_to(each, device) for each in now)]), f"{task} starts at {start}"
            share = costs.overlap if second or len(now) > 1 else 1.0
            assert end == start + share * duration(task), f"{task} takes {end - start}"
            free = end


def count_peak(simulation: Simulation, device: int) -> int:
    """The most activations on ``device`` at the start of any of its forwards, each counted from F to B or W."""
    lives: dict[tuple[int, int], list[float]] = {}
    timed = zip(simulation.schedule.orders[device], simulation.starts[device], simulation.ends[device], strict=True)
    for task, start, end in timed:
        if task.kind is Kind.F:
            lives[task.stage, task.microbatch] = [start, 0.0]
        elif task.kind in (Kind.B, Kind.W):
            lives[task.stage, task.microbatch][1] = end
    counts = (sum(born <= now < gone for born, gone in lives.values()) for now, _ in lives.values())
    return max(counts, default=0)


def check_versions(schedule: Schedule) -> None:
    """A forward sees every update before it, a backward what its forward saw; with a flush there is one version."""
    stashing = schedule.weights is WeightRule.STASH
    for whole, numbers, peak in zip(schedule.orders, versions(schedule), peak_versions(schedule), strict=True):
        assert len(numbers) == len(whole)
        staged = [(task, version) for task, version in zip(whole, numbers, strict=True) if task.kind not in VOCABULARY]
        order, seen = [task for task, _ in staged], [version for _, version in staged]
        updates = {task.stage: 0 for task in order}
        held = [len(updates)]
        used: dict[tuple[int, int], set[tuple[int, int]]] = {}  # what each microbatch that is under way has seen
        first: dict[tuple[int, int], int] = {}
        for (kind, stage, microbatch, _), version in zip(order, seen, strict=True):
            cell = stage, microbatch
            expected = updates[stage] if kind is Kind.F else first[cell]
            assert version == expected, f"{kind.name} of {cell} sees version {version}"
            first.setdefault(cell, version)
            used.setdefault(cell, set()).add((stage, version))
            if kind in (Kind.B, Kind.W):
                del used[cell]
                updates[stage] += stashing
            held.append(len(set(updates.items()).union(*used.values())))
        assert peak == max(held), f"{peak} versions are said to be held, and {max(held)} are"
