"""The law of ``serve.batching``, for every registered policy."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.serve.batching.contract import Batching
from penstock.serve.engine.room import StepRoom
from penstock.testing.engine.machine import machine_of
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_batching import (
    check_charges,
    check_crowding,
    check_forks,
    check_no_starvation,
    check_parts,
    check_priority,
    check_progress,
    check_shares,
    check_stall_free,
)

POLICIES = {name: each.at_work() for name, each in enrolled("serve.batching").items() if isinstance(each, Batching)}


def play(name: str, examples: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine_of(POLICIES[name]), settings=chosen)


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_batching_holds(name):
    play(name, examples=3, steps=20)


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_starves_and_the_urgent_go_first(name):
    check_no_starvation(POLICIES[name])
    check_priority(POLICIES[name])
    check_shares(POLICIES[name])
    check_progress(POLICIES[name])


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each == "nanoflow" else pytest.mark.slow) for each in POLICIES]
)
def test_parts_of_a_step_do_not_depend_on_each_other(name):
    check_parts(POLICIES[name])


def test_what_the_law_plays_of_nanoflow_is_split(monkeypatch):
    split, usual = [], StepRoom.split

    def counted(room, *counts, lead):
        split.append(counts)
        usual(room, *counts, lead=lead)

    monkeypatch.setattr(StepRoom, "split", counted)
    check_parts(POLICIES["nanoflow"])
    assert len(split) > 10


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("sarathi", "batchllm") else pytest.mark.slow) for name in POLICIES]
)
def test_a_crowd_is_served_right_and_forks_leave_others_alone(name):
    check_crowding(POLICIES[name], seed=list(POLICIES).index(name))
    check_forks(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_key_does_not_pay_for_preemptions(name):
    check_charges(POLICIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_many_crowds_are_served_right(name):
    for seed in range(16):
        check_crowding(POLICIES[name], seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds_for_long_courses(name):
    play(name, examples=300, steps=80)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["sarathi"])
def test_no_running_sequence_stalls(name, seed):
    check_stall_free(POLICIES[name], seed)
