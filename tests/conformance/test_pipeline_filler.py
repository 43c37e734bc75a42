"""The law of ``pipeline.filler``, for every registered policy."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create
from penstock.testing.enrolled import enrolled

FILLERS = enrolled("pipeline.filler")
SECONDS = st.integers(0, 40).map(lambda number: number / 8)


def check(policy, simulation: Simulation, frozen: list[float]) -> None:
    for device, fillers in enumerate(policy.fill(simulation, frozen)):
        starts, ends = simulation.starts[device], simulation.ends[device]
        last = ends[-1]
        work = sorted([*zip(starts, ends, strict=True), *((filler.start, filler.end) for filler in fillers)])
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(work)), "overlap"
        for layer, seconds in enumerate(frozen):
            parts = [filler for filler in fillers if filler.layer == layer]
            assert [filler.part for filler in parts] == list(range(len(parts)))
            assert sum(filler.share for filler in parts) == pytest.approx(1)
            for filler in parts:
                assert filler.end - filler.start == pytest.approx(filler.share * seconds, abs=1e-9)
        assert [filler.layer for filler in fillers] == sorted(filler.layer for filler in fillers)
        # Idle time within the step, counted anew from all that the device does there.
        within = [(start, end) for start, end in work if start < last]
        packed = sum(filler.end - filler.start for filler in fillers if filler.start < last)
        idle = last - sum(end - start for start, end in within)
        before = last - sum(end - start for start, end in zip(starts, ends, strict=True))
        assert before - idle == pytest.approx(packed, abs=1e-9)
        assert all(filler.end <= last + 1e-9 or filler.start >= last for filler in fillers)


@pytest.mark.parametrize("name", FILLERS)
@settings(max_examples=60)
@given(
    schedule=st.sampled_from(["gpipe", "1f1b", "v_half", "chimera"]),
    frozen=st.lists(SECONDS, max_size=5),
    transfer=SECONDS,
)
def test_the_law_of_fillers_holds(name, schedule, frozen, transfer):
    built = create("pipeline.schedule", schedule).build(4, 6)
    check(FILLERS[name], simulate(built, Times(transfer=transfer).costs(built)), frozen)


@pytest.mark.parametrize("name", FILLERS)
def test_a_negative_time_is_refused(name):
    built = create("pipeline.schedule", "gpipe").build(2, 2)
    with pytest.raises(UsageError, match="layer 1 takes -1"):
        FILLERS[name].fill(simulate(built, Times().costs(built)), [1, -1])


def test_diffusionpipe_by_hand():
    """GPipe with one microbatch: device 0 idles from 1 to 4, device 1 until 1 and, when it is done, as of 4."""
    built = create("pipeline.schedule", "gpipe").build(2, 1)
    filled = create("pipeline.filler", "diffusionpipe", parts=4).fill(simulate(built, Times().costs(built)), [2.0, 2.0])
    spans = [[(f.layer, f.part, f.share, f.start, f.end) for f in device] for device in filled]
    assert spans == [
        [(0, 0, 1, 1, 3), (1, 0, 0.5, 3, 4), (1, 1, 0.5, 6, 7)],
        [(0, 0, 0.5, 0, 1), (0, 1, 0.5, 4, 5), (1, 0, 1, 5, 7)],
    ]
