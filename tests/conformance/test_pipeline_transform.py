"""The law of ``pipeline.transform``, for every registered transform of every registered schedule."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.pipeline.ir.schedule import WeightRule
from penstock.pipeline.simulate.times import Times
from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_schedule import variants
from penstock.testing.pipeline_transform import check_transform

TRANSFORMS = enrolled("pipeline.transform")
SCHEDULES = enrolled("pipeline.schedule")
FLUSHING = [name for name, policy in SCHEDULES.items() if policy.build(2, 2).weights is WeightRule.FLUSH]
SECONDS = st.integers(0, 6).map(lambda number: number / 2)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("schedule", FLUSHING)
def test_the_law_of_transforms_holds(name, schedule):
    for variant in variants(TRANSFORMS[name]):
        for devices, microbatches in ((2, 2), (4, 8)):
            check_transform(variant, SCHEDULES[schedule].build(devices, microbatches), variant.times)


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(max_examples=60)
@given(data=st.data(), rounds=st.integers(1, 3), host=SECONDS, transfer=SECONDS, output=SECONDS)
def test_the_law_holds_for_any_times(name, data, rounds, host, transfer, output):
    schedule = SCHEDULES[data.draw(st.sampled_from(FLUSHING))].build(4, 4 * rounds)
    each = st.lists(SECONDS, min_size=schedule.stages, max_size=schedule.stages).map(tuple)
    fields = {field: data.draw(each) for field in ("forward", "input_grad", "weight_grad")}
    times = Times(**fields, transfer=transfer, host=host, output=output)
    policy = data.draw(st.sampled_from(list(variants(TRANSFORMS[name]))))
    if "times" in type(policy).model_fields:
        policy = policy.model_copy(update={"times": times})
    check_transform(policy, schedule, times)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_schedules_without_a_flush_are_refused(name):
    with pytest.raises(UsageError, match="stashes several"):
        TRANSFORMS[name].apply(SCHEDULES["pipedream"].build(2, 4))
