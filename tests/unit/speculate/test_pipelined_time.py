"""The time of speculation in a pipeline, by hand and by bounds."""

from __future__ import annotations

import pytest

from penstock.core.randomness import numpy_generator
from penstock.speculate.pipelined_time import pipelined_seconds


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_where_nothing_is_accepted_it_is_no_slower_than_plain_decoding(stages):
    for faster in (1.0, 0.5):
        times = [2.0] * stages, [2.0 * faster] * stages
        assert pipelined_seconds(*times, stages - 1, 4, [0] * 7) == 7 * 2.0 * stages


def test_where_stages_differ_a_step_waits_for_one_run_at_most():
    draw = numpy_generator(0, "tests/pipelined_time")
    for _ in range(20):
        single = draw.uniform(0.5, 2, size=4).tolist()
        found = pipelined_seconds(single, single, 3, 4, [0] * 9)
        assert 9 * sum(single) - 1e-9 <= found <= 9 * sum(single) + 8 * max(single)


def test_a_step_takes_as_long_as_the_run_in_which_it_is_settled():
    """Three stages of one second: a run of two tokens is through a second behind the one before it."""
    for accepted, seconds in ((0, 3.0), (1, 4.0), (2, 4.0), (3, 5.0), (4, 5.0)):
        assert pipelined_seconds([1.0] * 3, [1.0] * 3, 2, 2, [accepted]) == seconds


def test_a_run_that_nobody_needs_is_ended_and_those_behind_it_are_skipped():
    """With more runs than stages, the first stage is busy when the step is settled, for the rest of one run."""
    assert pipelined_seconds([1.0, 1.0], [1.5, 1.5], 5, 1, [0, 0]) == pytest.approx(2.0 + (2.5 - 2.0) + 2.0)


def test_all_that_is_accepted_makes_it_faster():
    plain = pipelined_seconds([1.0] * 4, [1.0] * 4, 0, 4, [0] * 13)
    assert pipelined_seconds([1.0] * 4, [1.0] * 4, 3, 4, [12]) < plain / 7
