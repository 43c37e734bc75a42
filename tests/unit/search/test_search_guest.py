"""Errands of search in an engine's process: their time, their scorers, and what they leave of others' news."""

from __future__ import annotations

import json
import time

import pytest

from penstock import LLM, SamplingParams
from penstock.core.errors import UsageError
from penstock.core.progress import silent
from penstock.search.guest import guest
from penstock.serve.messages import Request

ENDLESS = {"program": {"name": "until_accepted"}, "scorer": "exact_match", "budget": 10**6, "problem": {"answer": "?"}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("python-1m", progress=silent, check=True, cache_tokens=4096)


def request(llm: LLM, **fields) -> Request:
    return Request("r/0", llm.tokens("def add(a, b):\n"), SamplingParams(max_tokens=12, seed=1), **fields)


def run(llm: LLM, host) -> list[dict]:
    done = []
    while host.busy:
        _, news = host.take(llm.engine.step() if llm.engine.busy else [])
        done += [json.loads(each.result) for each in news]
    while llm.engine.busy:
        host.take(llm.engine.step())
    return done


def test_a_search_ends_in_time_with_the_best_of_what_it_has(llm):
    host = guest(llm.engine, "python-1m")
    host.begin(request(llm, deadline=0.2), json.dumps(ENDLESS))
    (found,) = run(llm, host)
    assert found["error"] is None and found["tokens"] and 0 < found["ledger"]["generated"] < 10**6
    assert llm.engine.snapshot().held == 0


def test_news_of_others_are_passed_on(llm):
    host = guest(llm.engine, "python-1m")
    host.begin(request(llm), json.dumps(ENDLESS | {"budget": 30}))
    llm.engine.add(Request("other", llm.tokens("class A:\n"), SamplingParams(max_tokens=4, temperature=0)))
    others, done = [], []
    while llm.engine.busy or host.busy:
        left, news = host.take(llm.engine.step() if llm.engine.busy else [])
        others += left
        done += news
    assert {delta.id for delta in others} == {"other"} and sum(len(delta.tokens) for delta in others) == 4
    (found,) = [json.loads(each.result) for each in done]
    assert found["ledger"]["generated"] == 30 and found["exhausted"]


def test_a_scorer_that_takes_its_time_holds_up_nobody(llm, monkeypatch):
    """While it thinks, the guest gives the thread back at once."""
    from penstock.search.scorers.exact_match import ExactMatch

    def slow(self, problem, candidates):
        time.sleep(30)
        return [0.0] * len(candidates)

    monkeypatch.setattr(ExactMatch, "score", slow)
    host = guest(llm.engine, "python-1m")
    host.begin(request(llm), json.dumps(ENDLESS | {"seconds": 0.3}))
    turns = 0
    while turns < 5 or llm.engine.busy:
        host.take(llm.engine.step() if llm.engine.busy else [])
        turns += not llm.engine.busy
    assert host.busy
    host.end("r/0")
    (found,) = run(llm, host)
    assert found["error"] is None and found["tokens"]
    assert llm.engine.snapshot().held == 0


def test_branches_that_multiply_are_refused(llm):
    """Each option is within its limit; their product would be made on the engine's thread, while others wait."""
    host = guest(llm.engine, "python-1m")
    program = {"name": "dvts", "trees": 256, "expand": 256}
    host.begin(request(llm), json.dumps({"program": program, "scorer": "majority", "budget": 300}))
    (found,) = run(llm, host)
    assert found["error"] == (
        "UsageError: the search would have 1,276 branches open at once, and may have 1,024: "
        "give its program smaller options"
    )
    assert found["ledger"]["forks"] <= 1024 + 256 and llm.engine.snapshot().held == 0


def test_what_is_no_search_is_refused(llm):
    host = guest(llm.engine, "python-1m")
    for changed, said in (
        ({"program": {"name": "bean"}}, "did you mean 'beam'"),
        ({"scorer": "exact_mach"}, "did you mean 'exact_match'"),
        ({"budget": -1}, "greater than 0"),
        ({"program": {"name": "cascade"}}, "asks the model 'strong'"),
        ({"program": {"name": "retrieval"}, "problem": {"documents": "a"}}, "no list of texts"),
    ):
        with pytest.raises(UsageError, match=said):
            host.begin(request(llm), json.dumps(ENDLESS | changed))
    assert not host.busy
