"""The oracle of engines: what it takes for right."""

from __future__ import annotations

import pytest

from penstock.testing.reference import ROUNDING, picked


@pytest.mark.parametrize(
    ("uniform", "said", "wanted"),
    [
        (0.1, None, 0),
        (0.1, 1, 0),
        (0.25 - ROUNDING / 2, 1, 1),  # the boundary may as well be before it
        (0.25 + ROUNDING / 2, 0, 0),  # or behind it
        (0.25 - ROUNDING / 2, 2, 0),  # which has no chance
        (0.25 - ROUNDING / 2, 3, 0),
        (0.25 - 2 * ROUNDING, 1, 0),
        (0.25 + 2 * ROUNDING, 0, 1),
        (1 - ROUNDING / 2, 3, 3),
    ],
)
def test_what_was_said_is_right_within_rounding_of_a_boundary_alone(uniform: float, said: int | None, wanted: int):
    assert picked([0.25, 0.5, 0.0, 0.25], uniform, said) == wanted
