"""What several threads ask of a model is computed together, and fails alone."""

from __future__ import annotations

import threading

import pytest

from penstock.search.scorers.gathering import Gathered


def gathered(compute, several: list[list[int]]) -> tuple[list[object], list[list[int]]]:
    """What each thread got or had raised, and what was computed at once: the first call is held until the others'
    items are there."""
    entered, free, passes = threading.Event(), threading.Event(), []
    found: list[object] = [None] * len(several)

    def computed(items: list[int]) -> list[int]:
        passes.append(items)
        if len(passes) == 1:
            entered.set()
            assert free.wait(20)
        return compute(items)

    both = Gathered(computed)

    def ask(place: int) -> None:
        try:
            found[place] = both(several[place])
        except ValueError as error:
            found[place] = error

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(several))]
    threads[0].start()
    assert entered.wait(20)
    for thread in threads[1:]:
        thread.start()
    while both._waiting.qsize() < len(several) - 1:
        entered.wait(0.001)
    free.set()
    for thread in threads:
        thread.join(20)
    return found, passes


def test_what_gathers_while_the_model_computes_is_one_batch():
    found, passes = gathered(lambda items: [10 * item for item in items], [[1], [2, 3], [], [4]])
    assert found == [[10], [20, 30], [], [40]]
    assert passes[0] == [1] and sorted(passes[1]) == [2, 3, 4] and len(passes) == 2


def test_who_asks_for_what_cannot_be_computed_fails_alone():
    def compute(items: list[int]) -> list[int]:
        if 3 in items:
            raise ValueError("3 cannot be")
        return items

    found, _ = gathered(compute, [[1], [2], [3, 4], [5]])
    assert [found[place] for place in (0, 1, 3)] == [[1], [2], [5]]
    assert isinstance(found[2], ValueError)
    with pytest.raises(ValueError, match="3 cannot be"):
        Gathered(compute)([3])
