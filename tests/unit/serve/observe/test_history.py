"""What is remembered of requests, and how it is told."""

from __future__ import annotations

import pytest

from penstock.core.events import Event
from penstock.serve.observe.history import EACH, History
from penstock.serve.observe.words import sentence


def event(time: float, kind: str, id: str = "cmpl-a/0", index: int = 0, **detail) -> Event:
    return Event(time, kind, id, index, detail)


def arrived(time: float, id: str = "cmpl-a/0", index: int = 0) -> Event:
    return event(time, "arrived", id, index, tokens=7, waiting=1)


def preempted(time: float, id: str = "cmpl-a/0", by: str = "cmpl-b/1", by_index: int = 0) -> Event:
    return event(time, "preempted", id, by=by, by_index=by_index, missing=2, computed=40)


def seen(*events: Event, kept: int = 100) -> History:
    history = History(kept)
    for each in events:
        history.see([each], None)
    return history


def admitted(time: float, cached: int = 0) -> Event:
    return event(time, "admitted", cached=cached, tokens=7)


COURSE = (
    arrived(100.0),
    admitted(100.5),
    event(101.0, "first"),
    preempted(102.0),
    admitted(104.0, cached=5),
    event(104.5, "settled", drafted=8, accepted=3),
    event(104.75, "settled", drafted=4, accepted=4),
    preempted(105.0, by="cmpl-a/0"),
    admitted(105.25),
    event(106.0, "finished", reason="length", generated=30),
)


def test_the_questions_have_answers():
    (course,) = seen(*COURSE).of("cmpl-a")
    told = course.record(now=107.0)
    assert (told["queue_seconds"], told["first_token_seconds"], told["seconds"]) == (0.5, 1.0, 6.0)
    assert (told["preemptions"], told["preempted_seconds"]) == (2, 2.25)
    assert (told["drafted_tokens"], told["accepted_tokens"], told["state"]) == (12, 7, "finished")
    assert told["story"] == [
        "+0.000 s  arrived with 7 tokens; 1 other waited",
        "+0.500 s  got memory after waiting 500.0 ms: 0 of its 7 tokens were in the cache",
        "+1.000 s  its first token came",
        "+2.000 s  preempted by cmpl-b/1, which needed 2 more blocks; the memory of its 40 computed tokens is taken",
        "+4.000 s  got memory after waiting 2.00 s: 5 of its 7 tokens were in the cache",
        "+5.000 s  preempted: it needed 2 more blocks, and nobody behind it had any to give; "
        "the memory of its 40 computed tokens is taken",
        "+5.250 s  got memory after waiting 250.0 ms: 0 of its 7 tokens were in the cache",
        "+6.000 s  ended after 30 tokens: length",
    ]
    assert told["summary"] == (
        "It queued 500.0 ms; its first token came 1.00 s after its arrival; it was preempted 2 times and waited 2.25 s "
        "for memory then; 7 of 12 drafted tokens were accepted; it ended 6.00 s after its arrival."
    )
    assert told["events"][3] == {
        "time": 102.0,
        "kind": "preempted",
        "by": "cmpl-b/1",
        "by_index": 0,
        "missing": 2,
        "computed": 40,
    }


@pytest.mark.parametrize(
    ("events", "state", "summary"),
    [
        (1, "waiting", "It waited for memory from its arrival on, and still does."),
        (2, "running", "It queued 500.0 ms; it is running."),
        (4, "preempted", "it was preempted 1 time and waited 5.00 s for memory then; it is preempted."),
    ],
)
def test_one_that_is_under_way(events, state, summary):
    (course,) = seen(*COURSE[:events]).of("cmpl-a")
    assert course.state == state
    assert summary in course.summary(now=107.0)


def test_one_that_ended_without_memory_waited_until_then():
    (course,) = seen(arrived(1.0), event(3.0, "finished", reason="abort", generated=0)).of("cmpl-a")
    assert course.summary(now=107.0) == "It waited for memory from its arrival on until it ended."
    (course,) = seen(*COURSE[:4], event(109.0, "finished", reason="abort", generated=9)).of("cmpl-a")
    assert course.record(now=107.0)["preempted_seconds"] == 7.0


def test_prompts_and_continuations_are_found_by_the_id_that_clients_see():
    ids = [(number, index) for number in (1, 0, 10) for index in (1, 0)]
    history = seen(*(arrived(1.0, f"chatcmpl-x/{number}", index) for number, index in ids), arrived(2.0, "plain"))
    assert [(each.prompt, each.index) for each in history.of("chatcmpl-x")] == sorted(ids)
    assert [(each.prompt, each.index) for each in history.of("chatcmpl-x/10")] == [(10, 0), (10, 1)]
    assert len(history.of("plain")) == 1
    for unknown in ("chatcmpl", "chatcmpl-x/2", "chatcmpl-x/", "chatcmpl-x/0/0", "chatcmpl-x/" + "9" * 5000, "/", ""):
        assert history.of(unknown) == []
    assert history.newest(1) == ["plain"]
    assert history.newest(9) == ["plain", "chatcmpl-x"]


def test_an_id_that_comes_again_is_a_new_request():
    history = seen(*COURSE, arrived(200.0))
    assert [each.state for each in history.of("cmpl-a")] == ["waiting"]


def test_the_oldest_are_forgotten_and_what_is_kept_is_bounded():
    history = History(kept=10)
    for number in range(500):
        history.see([arrived(float(number), f"cmpl-{number}/{part}") for part in range(number % 3 + 1)], None)
        kept = [len(history.of(id)) for id in history.newest(100)]
        assert sum(kept) <= 10
        assert history.newest(1) == [f"cmpl-{number}"]
    history.see([arrived(1.0, "cmpl-big/0", index) for index in range(40)], None)
    assert len(history.of("cmpl-big")) == 40  # what is under way is never cut in two
    # News of what was forgotten is nothing.
    history.see([preempted(9.0, "cmpl-0/0")], None)
    assert history.of("cmpl-0") == []


def test_many_preemptions_add_up_though_the_first_are_not_told():
    events = [each for n in range(EACH) for each in (admitted(2 * n + 1.0), preempted(2 * n + 2.0))]
    (course,) = seen(arrived(0.0), *events).of("cmpl-a")
    told = course.record(now=2.0 * EACH)
    assert (told["preemptions"], told["preempted_seconds"]) == (EACH, EACH - 1.0)
    assert told["events_forgotten"] == EACH + 1
    assert told["story"][0] == f"{EACH + 1} earlier events are not kept"
    assert len(told["story"]) == EACH + 1


def test_sentences():
    assert sentence(preempted(1.0, by_index=2)).startswith(
        "preempted by cmpl-b/1 (continuation 2), which needed 2 more"
    )
    assert sentence(event(1.0, "settled", drafted=1, accepted=0)) == "1 token drafted, 0 accepted"
    assert sentence(event(1.0, "forked", into="x")) == "forked into x"
    assert sentence(event(1.0, "truncated", tokens=1, left=9)) == "cut back by 1 token, to 9"
    assert sentence(event(1.0, "fed", tokens=2)) == "was fed 2 tokens"
    assert sentence(event(1.0, "preempted", why="load", computed=40)) == (
        "preempted, since the engine was given other weights; the memory of its 40 computed tokens is taken"
    )
    assert "was put to sleep" in sentence(event(1.0, "preempted", why="sleep", computed=1))
    told = sentence(event(1.0, "compressed", tokens=90, kept=1))
    assert told == "its cache was compressed from 90 tokens to 1"
    told = sentence(event(1.0, "compressed", tokens=90, kept=1, by="x", by_index=0, missing=1))
    assert told == "its cache was compressed from 90 tokens to 1, since x needed 1 more block"
    told = {"cached": 16, "tokens": 20, "forked": "y"}
    assert (
        sentence(event(1.0, "admitted", **told)) == "got memory: 16 of its 20 tokens were in the cache, shared with y"
    )
