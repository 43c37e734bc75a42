"""The law of ``pipeline.filler``.

Bugs that its clauses are there to catch:

- the example: bubbles that stay empty although something fits, or another order than the paper's.
- samples: a part that is lost, doubled or out of order; a layer that begins before the one before it is done.
- overlap: work that runs into the pipeline's own, or into other work; work of another length than its share.
- bubbles: idle times that are not offered, or that are none.
- idle time: work between the tasks of a step that is not counted as such, or lies across the end of the step.
"""

from __future__ import annotations

import itertools
import math

from penstock.core.errors import UsageError
from penstock.core.randomness import numpy_generator
from penstock.pipeline.fillers.contract import BubbleFiller
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create
from penstock.testing.refusals import refused

#: What numbers of seconds may be off by.
CLOSE = 1e-9


def check(policy: BubbleFiller) -> None:
    """Asserts the law of ``pipeline.filler`` on its example, and for schedules and layers of random times."""
    check_example(policy)
    draw = numpy_generator(0, "testing/pipeline.filler")
    for _ in range(60):
        name = ("gpipe", "1f1b", "v_half", "chimera")[draw.integers(4)]
        transfer, *frozen = (draw.integers(0, 41, draw.integers(1, 7)) / 8).tolist()
        check_fillers(policy, simulation(name, 4, 6, Times(transfer=transfer)), frozen)
    with refused(UsageError, "layer 1 takes -1"):
        policy.fill(simulation("gpipe", 2, 2, Times()), [1, -1])


def simulation(name: str, devices: int, microbatches: int, times: Times) -> Simulation:
    """One step of a schedule."""
    policy = create("pipeline.schedule", name)
    assert isinstance(policy, PipelineSchedule)
    schedule = policy.build(devices, microbatches)
    return simulate(schedule, times.costs(schedule))


def check_example(policy: BubbleFiller) -> None:
    """On one device the fillers are those that the policy gives."""
    example, gaps, frozen, packed = policy.example()
    found = example.pack(gaps, frozen)
    assert found == packed, f"the fillers are {found}, and {packed} in the example"


def check_fillers(policy: BubbleFiller, simulation: Simulation, frozen: list[float]) -> None:
    """The law for one step and some frozen layers."""
    for device, fillers in enumerate(policy.fill(simulation, frozen)):
        starts, ends = simulation.starts[device], simulation.ends[device]
        last = ends[-1]
        idle_times = [(end, start) for end, start in zip([0.0, *ends], starts, strict=False) if end < start]
        offered = policy.pack([*idle_times, (last, math.inf)], frozen)
        assert fillers == offered, f"of the idle times {idle_times} of device {device} the policy makes something else"
        work = sorted([*zip(starts, ends, strict=True), *((filler.start, filler.end) for filler in fillers)])
        for (_, end), (start, _) in itertools.pairwise(work):
            assert end <= start + CLOSE, f"two tasks of device {device} overlap at {start}"
        for layer, seconds in enumerate(frozen):
            parts = [filler for filler in fillers if filler.layer == layer]
            assert [filler.part for filler in parts] == list(range(len(parts))), f"parts of layer {layer} are missing"
            assert math.isclose(sum(filler.share for filler in parts), 1), f"layer {layer} is not passed by all samples"
            for filler in parts:
                assert math.isclose(filler.end - filler.start, filler.share * seconds, abs_tol=CLOSE), f"{filler}"
        layers = [filler.layer for filler in fillers]
        assert layers == sorted(layers), f"the layers come in the order {layers}"
        # Idle time within the step, counted anew from all that the device does there.
        within = [(start, end) for start, end in work if start < last]
        packed = sum(filler.end - filler.start for filler in fillers if filler.start < last)
        idle = last - sum(end - start for start, end in within)
        before = last - sum(end - start for start, end in zip(starts, ends, strict=True))
        assert math.isclose(before - idle, packed, abs_tol=CLOSE), f"{packed} s are packed, {before - idle} are gone"
        for filler in fillers:
            assert filler.end <= last + CLOSE or filler.start >= last, f"{filler} lies across the end of the step"
