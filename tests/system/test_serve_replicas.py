"""``penstock serve --replicas``: engines behind one address answer as one, also when they die or are drained."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from browser import CHROMIUM, Browser
from served import Served, alive

PROMPTS = [f"def {name}(" for name in ("add", "fibonacci", "sort", "parse", "main", "read")]
LONG = {"prompt": "import", "max_tokens": 500, "ignore_eos": True}
PATIENCE = 120
#: Else the last bits of scores depend on what is computed beside them, and a draw may fall to a neighbouring token.
EXACT = ("--set", "deterministic=true")


def bodies() -> list[dict]:
    """Greedy ones and drawn ones."""
    return [
        {"prompt": prompt, "max_tokens": 24, "temperature": number % 2, "seed": number, "n": 1 + number % 3 // 2}
        for number, prompt in enumerate(PROMPTS)
    ]


def said(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def states(server: Served) -> list[str]:
    return [each["state"] for each in server.http.get("/health").json()["replicas"]]


def replica_of(server: Served, id: str) -> int:
    """The replica that has answered a request."""
    (told,) = server.http.get(f"/v1/requests/{id}/events").json()["continuations"]
    return told["events"][0]["replica"]


def until(true, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one() -> list[list[str]]:
    """What a single engine answers."""
    with Served(*EXACT) as server:
        return [said(server.post("/v1/completions", **body)) for body in bodies()]


@pytest.fixture(scope="module")
def two() -> Iterator[Served]:
    options = ["--replicas", "2", "--routing-option", "ahead=1", "--control", "--restarts", "50", *EXACT]
    with Served(*options) as server:
        yield server


def test_answers_are_those_of_one_engine_and_both_give_some(two, one):
    assert "with 2 replicas" in two.greeting
    with ThreadPoolExecutor(6) as pool:
        work = [pool.submit(two.post, "/v1/completions", **body) for body in bodies()]
        answers = [each.result() for each in work]
    assert [said(answer) for answer in answers] == one
    figures = two.figures()
    assert all(figures[f'output_tokens_total{{replica="{number}"}}'] > 0 for number in range(2))
    assert figures['memory_bytes{rank="0",replica="1",use="weights"}'] > 0
    assert figures['replica_state{replica="0",state="ready"}'] == 1
    told = two.http.get(f"/v1/requests/{answers[0].json()['id']}/events").json()["continuations"][0]["story"]
    assert "arrived at replica " in told[0]
    assert {replica_of(two, answer.json()["id"]) for answer in answers if len(said(answer)) == 1} == {0, 1}


def streamed(server: Served, body: dict, begun: threading.Event) -> tuple[int, dict | None]:
    """The error that a stream ends with; ``begun`` is set once some of its text has come."""
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        last = ""
        for line in answer.iter_lines():
            if line:
                begun.set()
                last = line.removeprefix("data: ")
    return answer.status_code, None if last == "[DONE]" else json.loads(last).get("error")


def test_a_killed_replica_fails_what_it_has_shown_and_nothing_else(two, one):
    """The others are answered by the other one, in full and with the same tokens; it comes back, as operators left the
    rest."""
    before, name = two.figures(), 'replica_restarts_total{replica="0"}'
    ended = [said(two.post("/v1/completions", **{**LONG, "max_tokens": 100, "temperature": 0}))]
    begun = [threading.Event() for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        shown = [pool.submit(streamed, two, LONG, each) for each in begun]
        for each in begun:
            assert each.wait(PATIENCE)
        whole = [pool.submit(two.post, "/v1/completions", **LONG, temperature=0) for _ in range(2)]
        until(lambda: sum(two.figures()[f'replica_under_way{{replica="{number}"}}'] for number in range(2)) == 4)
        time.sleep(0.1)
        os.kill(two.engines[0], signal.SIGKILL)
        outcomes = [each.result(PATIENCE) for each in shown]
        texts = [said(each.result(PATIENCE)) for each in whole]
    assert sorted(error is None for _, error in outcomes) == [False, True]
    (error,) = [error for _, error in outcomes if error is not None]
    assert error["code"] == "replica_lost"
    assert "was killed by signal 9; ask again" in error["message"]
    assert texts[0] == texts[1]
    assert texts[0][0].startswith(ended[0][0])
    assert two.figures()["resent_total"] == before["resent_total"] + 1
    until(lambda: states(two) == ["ready", "ready"])
    assert two.figures()[name] == before[name] + 1
    assert [said(two.post("/v1/completions", **body)) for body in bodies()] == one


def test_a_drained_replica_ends_nothing_and_gets_nothing(two):
    begun = [threading.Event() for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(streamed, two, {**LONG, "max_tokens": 300}, each) for each in begun]
        for each in begun:
            assert each.wait(PATIENCE)
        drained = pool.submit(two.post, "/replicas/1/drain")
        until(lambda: states(two)[1] in ("draining", "drained"))
        answers = [two.post("/v1/completions", prompt=prompt, max_tokens=2).json() for prompt in PROMPTS]
        assert [each.result(PATIENCE) for each in work] == [(200, None)] * 2
        assert drained.result(PATIENCE).json()["replicas"][1]["state"] == "drained"
    assert {replica_of(two, answer["id"]) for answer in answers} == {0}
    assert two.http.get("/health").json()["status"] == "degraded"
    assert two.post("/replicas/0/drain").status_code == 200
    refused = two.post("/v1/completions", prompt="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
    assert two.http.get("/health").status_code == 503
    assert two.post("/replicas/2/drain").status_code == 400
    for number in range(2):
        assert two.post(f"/replicas/{number}/undrain").status_code == 200
    assert two.http.get("/health").json()["status"] == "ok"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_shows_replicas(two, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=f"{two.url}/")
        found = browser.until("document.readyState === 'complete' && at('replicas').innerText")
    assert found.count("ready, 0 under way") == 2


def test_operators_and_clients_reach_all_replicas_also_one_that_comes_later(two):
    assert two.post("/pause").json()["paused"] is True
    restarts = two.figures()['replica_restarts_total{replica="1"}']
    os.kill(two.engines[1], signal.SIGKILL)
    until(lambda: two.figures()['replica_restarts_total{replica="1"}'] == restarts + 1)
    assert [two.figures()[f'paused{{replica="{number}"}}'] for number in range(2)] == [1, 1]
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(two.post, "/v1/completions", **LONG) for _ in range(2)]
        until(lambda: sum(two.figures()[f'replica_under_way{{replica="{number}"}}'] for number in range(2)) == 2)
        two.post("/resume")
        until(lambda: len(two.http.get("/v1/requests?limit=2").json()["data"]) == 2)
        for each in two.http.get("/v1/requests?limit=2").json()["data"]:
            assert two.http.delete(f"/v1/requests/{each['id']}").status_code == 200
        assert [each.result(PATIENCE).json()["choices"][0]["finish_reason"] for each in work] == ["length"] * 2
    first = two.post("/v1/responses", input="What is a stack? " * 9, max_output_tokens=24)
    second = two.post(
        "/v1/responses", input="And a queue?", max_output_tokens=4, previous_response_id=first.json()["id"]
    )
    assert second.json()["usage"]["input_tokens_details"]["cached_tokens"] > 0


def test_replicas_end_with_their_server_however_it_ends():
    for number, status in ((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)):
        with Served("--replicas", "2", "--control") as server:
            engines = server.engines
            server.process.send_signal(number)
            assert server.process.wait(PATIENCE) == status
            until(lambda engines=engines: not any(map(alive, engines)))


def test_a_server_whose_replicas_die_too_often_ends():
    with Served("--replicas", "2", "--control", "--restarts", "0") as server:
        for engine in server.engines:
            os.kill(engine, signal.SIGKILL)
        assert server.process.wait(PATIENCE) == 1
        assert "was killed by signal 9" in server.said()
        assert "Traceback" not in server.said()
