"""The law of ``eval.task``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.eval.contract import Predicted, Written
from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.eval_task import check_draw, check_judge, check_probabilities

POLICIES = enrolled("eval.task")


def examples(kind):
    return [name for name, task in POLICIES.items() if isinstance(task, kind)]


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_drawn(name):
    check_draw(POLICIES[name].example())


@pytest.mark.parametrize("name", examples(Written))
def test_references_are_right_and_all_else_is_wrong(name):
    check_judge(POLICIES[name].example())


@pytest.mark.parametrize("name", examples(Predicted))
def test_log_probabilities_are_those_of_transformers(name):
    check_probabilities(POLICIES[name].example())


@pytest.mark.parametrize("name", POLICIES)
def test_a_task_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])
