"""The bubbles of a step, filled."""

from __future__ import annotations

from penstock.pipeline.simulate.simulator import simulate
from penstock.pipeline.simulate.times import Times
from penstock.policy import create


def test_diffusionpipe_by_hand():
    """GPipe with one microbatch: device 0 idles from 1 to 4, device 1 until 1 and, when it is done, as of 4."""
    built = create("pipeline.schedule", "gpipe").build(2, 1)
    filled = create("pipeline.filler", "diffusionpipe", parts=4).fill(simulate(built, Times().costs(built)), [2.0, 2.0])
    spans = [[(f.layer, f.part, f.share, f.start, f.end) for f in device] for device in filled]
    assert spans == [
        [(0, 0, 1, 1, 3), (1, 0, 0.5, 3, 4), (1, 1, 0.5, 6, 7)],
        [(0, 0, 0.5, 0, 1), (0, 1, 0.5, 4, 5), (1, 0, 1, 5, 7)],
    ]
