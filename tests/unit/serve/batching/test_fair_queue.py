"""Who goes in next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.randomness import numpy_generator
from penstock.serve.batching.queue import FairQueue
from penstock.serve.batching.waves import Waves
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request


def sequence(arrival: int, key: str = "", priority: int = 0, limit: int = 10) -> Sequence:
    asked = Request(str(arrival), [1], SamplingParams(max_tokens=limit), priority, key)
    return Sequence(asked, 0, asked.sampling, [1], limit, arrival)


def test_a_key_that_floods_makes_the_other_wait_for_one_turn():
    queue = FairQueue()
    for arrival in range(1000):
        queue.add(sequence(arrival, "flood"))
    for _ in range(300):
        queue.pop()
    for arrival in range(1000, 1010):
        queue.add(sequence(arrival, "calm"))
    keys = [queue.pop().request.key for _ in range(20)]
    places = [place for place, key in enumerate(keys) if key == "calm"]
    assert len(places) == 10
    assert all(place <= 2 * turn + 1 for turn, place in enumerate(places)), "each waits for one of the others"


def test_keys_get_tokens_alike_however_long_their_requests_are():
    queue = FairQueue()
    for arrival in range(400):
        queue.add(sequence(arrival, "long" if arrival < 200 else "short", limit=90 if arrival < 200 else 10))
    given = {"long": 0, "short": 0}
    for _ in range(100):
        chosen = queue.pop()
        given[chosen.request.key] += chosen.limit
    assert abs(given["long"] - given["short"]) <= 90


def test_a_key_cannot_hoard_its_turn():
    """One that waited for nothing while the other was served does not go first for as long now."""
    queue = FairQueue()
    queue.add(sequence(0, "late"))
    queue.pop()
    for arrival in range(1, 201):
        queue.add(sequence(arrival, "busy"))
    for _ in range(100):
        queue.pop()
    for arrival in range(201, 301):
        queue.add(sequence(arrival, "late"))
    keys = [queue.pop().request.key for _ in range(100)]
    assert 49 <= keys.count("late") <= 51


def test_the_urgent_go_first_whatever_their_key_was_given():
    queue = FairQueue()
    for arrival in range(6):
        queue.add(sequence(arrival, "a", priority=arrival % 3))
        queue.add(sequence(100 + arrival, "b", priority=arrival % 3))
    assert [queue.pop().request.priority for _ in range(12)] == [0] * 4 + [1] * 4 + [2] * 4


def test_one_that_was_thrown_out_goes_before_those_of_its_key_and_is_charged_once():
    queue = FairQueue()
    for arrival in range(4):
        queue.add(sequence(arrival))
    first, second = queue.pop(), queue.pop()
    for victim in (second, first):
        victim.preempted = True
        queue.add(victim)
    assert [queue.pop().arrival for _ in range(4)] == [0, 1, 2, 3]
    queue.add(sequence(10, ""))
    queue.add(sequence(11, "other"))
    assert queue.first().arrival == 11


def reference_order(waiting: list[Sequence], spent: dict[str, float]) -> list[Sequence]:
    """Those that may go next: of the most urgent priority, of a key that was given least, the earliest of the key."""
    urgent = min(each.request.priority for each in waiting)
    equal = [each for each in waiting if each.request.priority == urgent]
    least = min(spent[each.request.key] for each in equal)
    heads = {}
    for each in sorted(equal, key=lambda each: (not each.preempted, each.arrival)):
        heads.setdefault(each.request.key, each)
    return [each for key, each in heads.items() if spent[key] == least]


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "add", "pop", "remove"]), st.integers(0, 2), st.sampled_from("abc")),
        max_size=60,
    )
)
def test_any_course_follows_the_definition(events):
    """Against a list that is searched anew each time; what a key is given when it comes back is the queue's word."""
    queue, waiting = FairQueue(), []
    for arrival, (event, priority, key) in enumerate(events):
        if event == "add" or not waiting:
            waiting.append(sequence(arrival, key, priority, limit=5 + arrival % 7))
            queue.add(waiting[-1])
        elif event == "pop":
            assert queue.first() in reference_order(waiting, queue._spent)
            waiting.remove(queue.pop())
        else:
            victim = waiting.pop(arrival % len(waiting))
            queue.remove(victim)
        assert len(queue) == len(waiting)
        assert (queue.first() is None) == (not waiting)
    left = [queue.pop() for _ in range(len(waiting))]
    assert {each.arrival for each in left} == {each.arrival for each in waiting}
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.tuples(st.sampled_from(["add", "first", "last", "back", "remove"]), st.integers(0, 1)), max_size=60))
def test_waves_lose_nobody_and_plan_each_once(events):
    planned = []

    def plan(sequences):
        planned.extend(sequences)
        order = numpy_generator(len(planned), "plan").permutation(len(sequences))
        return [sequences[place] for place in order]

    waves, waiting, ran = Waves(plan), {}, []
    for arrival, (event, priority) in enumerate(events):
        if event == "add":
            waiting[arrival] = sequence(arrival, priority=priority)
            waves.add(waiting[arrival])
        elif event == "back" and ran:
            ran[-1].preempted = True
            waiting[ran[-1].arrival] = ran[-1]
            waves.add(ran[-1])
            assert waves.first() is ran.pop()
        elif event == "remove" and waiting:
            waves.remove(waiting.pop(min(waiting)))
        elif waiting and event in ("first", "last"):
            ran.append(waves.first(last=event == "last"))
            waves.remove(waiting.pop(ran[-1].arrival))
        assert len(waves) == len(waiting)
    while waiting:
        waves.remove(waiting.pop(waves.first().arrival))
    assert waves.first() is None
    assert len({each.arrival for each in planned}) == len(planned)
