"""What of the benchmark `pipeline` is derived from what it measured."""

from __future__ import annotations

import pytest
import torch

from penstock.core.bench import Bench, load


@pytest.mark.parametrize("measured", [("1f1b", "v_half", "zb_h1"), ("v_half", "zb_h1")])
def test_schedules_stand_beside_1f1b_on_the_same_runtime(measured):
    """With the papers that claim it; where 1F1B was left out, nothing is compared."""
    bench = Bench("pipeline", torch.device("cpu"), quick=True)
    rates, peaks = {"1f1b": 100.0, "v_half": 110.0, "zb_h1": 90.0}, {"1f1b": 8.0, "v_half": 6.0, "zb_h1": 8.0}
    for name in measured:
        peer = {"peer": "torch", "peer_value": 50.0}
        for metric, unit, better, value in (
            ("throughput", "tokens/s", "higher", rates[name]),
            ("peak memory of a device", "GB", "lower", peaks[name]),
        ):
            bench.row(
                subject=name, setting="s", metric=metric, unit=unit, better=better, value=value, ratio=1.0, **peer
            )
    before = len(bench.rows)
    load("pipeline").compare_with_1f1b(bench)
    found = {(row.subject, row.metric): row for row in bench.rows[before:]}
    if "1f1b" not in measured:
        assert not found
        return
    assert {key: (row.ratio, row.verdict, row.papers) for key, row in found.items()} == {
        ("zb_h1", "throughput"): (0.9, "contradicted", (3,)),
        ("v_half", "throughput"): (1.1, "confirmed", (21,)),
        ("v_half", "peak memory of a device"): (0.75, "confirmed", (21,)),
    }
    assert {row.peer for row in found.values()} == {"1f1b"}


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ("zb_h1, compiled", []),  # and what is made for its times
        ("zb_auto", ["zb_h1"]),
        ("ScheduleInterleavedZeroBubble", []),
    ],
)
def test_without_a_subject_that_fails_the_rest_of_its_group_is_measured(asked, left):
    pipeline = load("pipeline")
    group = pipeline.Group("ScheduleInterleavedZeroBubble", ["zb_h1", "zb_auto"], asked)
    group.leave_out_asked()
    assert group.names == left
