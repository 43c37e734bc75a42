"""Deaths and farewells of ``penstock serve``: nothing is lost silently, and nothing outlives the server."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from penstock.models import hub
from penstock.serve.run.record import read_steps
from served import Served, alive, children, serve_with_a_failing_rank

GREEDY = {"prompt": "class Stack:", "max_tokens": 24, "temperature": 0}
LONG = {"prompt": "import", "max_tokens": 2000, "ignore_eos": True}
#: Seconds for what takes a moment where nothing else is done.
PATIENCE = 120


def gone(process: int, seconds: float = PATIENCE) -> bool:
    """Whether a process has ended by then."""
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(process)


def answer_of(server: Served, body: dict) -> tuple[int, dict | None]:
    """The status of a request, and the error that it, or its stream, ended with."""
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code, json.loads(answer.read())["error"]
        last = [line for line in answer.iter_lines() if line][-1]
    found = last.removeprefix("data: ")
    return 200, None if found == "[DONE]" else json.loads(found).get("error")


@pytest.mark.parametrize("deaths", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_engine_is_told_and_ends_the_server(deaths):
    draw = random.Random(deaths)
    for _ in range(deaths):
        with Served() as server, ThreadPoolExecutor(6) as pool:
            engine = server.engine
            work = [pool.submit(answer_of, server, LONG | {"stream": bool(number % 2)}) for number in range(6)]
            server.until(lambda now: now["running"] == 6)
            time.sleep(draw.uniform(0, 0.3))
            os.kill(engine, signal.SIGKILL)
            for ended in work:
                status, error = ended.result(PATIENCE)
                assert (status, error["code"]) in ((503, "engine_died"), (200, "engine_died"))
                assert "was killed by signal 9" in error["message"]
            # While the server still answers, it says the same to newcomers.
            try:
                assert server.http.get("/health").status_code == 503
                assert server.post("/v1/completions", prompt="x").status_code == 503
            except httpx.TransportError:
                pass
            assert server.process.wait(PATIENCE) == 1
            assert "error: the engine's process was killed by signal 9" in server.said()
            assert "Traceback" not in server.said()


def test_an_engine_that_hangs_is_noticed():
    with Served("--patience", "1") as server, ThreadPoolExecutor(1) as pool:
        engine = server.engine
        time.sleep(1.5)  # an idle engine may be silent
        assert server.http.get("/health").status_code == 200
        os.kill(engine, signal.SIGSTOP)
        status, error = pool.submit(answer_of, server, LONG).result(PATIENCE)
        assert (status, error["code"]) == (503, "engine_died")
        assert "it said nothing for 1 seconds" in error["message"]
        assert server.process.wait(PATIENCE) == 1
        assert gone(engine)


def test_sigterm_drains():
    """The engine's process is the one that users have."""
    with Served(as_shipped=True) as server, ThreadPoolExecutor(2) as pool:
        engine = server.engine
        body = LONG | {"max_tokens": 400}
        work = [pool.submit(answer_of, server, body | {"stream": stream}) for stream in (True, False)]
        server.until(lambda now: now["running"] == 2)
        # The live page's stream must not keep the server.
        with server.http.stream("GET", "/events") as live:
            lines = live.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["running"] == 2
            server.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass
        assert [ended.result(PATIENCE) for ended in work] == [(200, None), (200, None)]
        assert server.process.wait(PATIENCE) == 0
        with pytest.raises(httpx.TransportError):
            server.http.get("/health")
        assert gone(engine)
        assert "Traceback" not in server.said()


@pytest.mark.slow
def test_a_drain_has_an_end():
    with Served("--drain", "0.5") as server, ThreadPoolExecutor(2) as pool:
        work = [pool.submit(answer_of, server, LONG | {"stream": stream, "n": 4}) for stream in (True, False)]
        server.until(lambda now: now["running"] == 8)
        server.process.send_signal(signal.SIGTERM)
        answers = [ended.result(PATIENCE) for ended in work]
        assert [(status, error["code"]) for status, error in answers] == [(200, "server_ends"), (503, "server_ends")]
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.said()


def test_a_deadline_ends_a_request_and_the_engine_dies_with_its_server(tmp_path):
    """What it records ends there too: in the midst of an answer, all steps have the tokens that came out of them."""
    path = tmp_path / "steps.bin"
    with Served("--deadline", "1", "--record", str(path)) as server:
        answer = server.post("/v1/completions", **LONG).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 2000
        assert server.until_idle()['finished_total{outcome="deadline"}'] == 1
        engine = server.engine
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(server.post, "/v1/completions", **LONG)
            server.until(lambda now: now["running"] == 1)
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                under_way.result(PATIENCE)
        assert gone(engine)
    steps = list(read_steps(path))
    assert len(steps) > 5
    assert all(tokens is not None for _, tokens in steps)


@pytest.mark.parametrize("requests", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_short_requests_and_random_departures_leave_every_block_free(server, requests):
    before = server.until_idle()
    draw = random.Random(requests)
    plans = [
        {
            "leave": draw.random() < 0.3,
            "pause": draw.uniform(0, 0.03),
            "body": {
                "prompt": [draw.randrange(50) for _ in range(draw.choice([1, 5, 40]))],
                "max_tokens": draw.randrange(1, 16),
                "n": draw.choice([1, 1, 2]),
                "stream": draw.random() < 0.7,
                "seed": draw.randrange(9),
            },
        }
        for _ in range(requests)
    ]
    room = threading.Semaphore(4)  # of two continuations at most: the queue never overflows

    def visit(plan: dict) -> int:
        with room, httpx.Client(base_url=server.url, headers=server.http.headers, timeout=60) as client:
            if not plan["leave"]:
                return client.post("/v1/completions", json=plan["body"]).status_code
            patience = httpx.Timeout(60, read=plan["pause"])
            try:
                client.post("/v1/completions", json=plan["body"], timeout=patience)
            except httpx.ReadTimeout:
                return 0
            return 200

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(visit, plans))
    after = server.until_idle()
    assert set(outcomes) == {0, 200}
    assert all(outcome == 200 for outcome, plan in zip(outcomes, plans, strict=True) if not plan["leave"])
    finished = {name: after[name] - before.get(name, 0) for name in after if name.startswith("finished_total")}
    assert sum(finished.values()) == sum(plan["body"]["n"] for plan in plans)
    assert after["cache_blocks_held"] == 0


def check_a_killed_rank(served: Served, pool: ThreadPoolExecutor) -> None:
    """Kills rank 1 under a request: it is told so, the server ends, says whose fault it was, and leaves no process."""
    engine = served.engine
    (rank,) = children(engine)
    under_way = pool.submit(answer_of, served, LONG)
    served.until(lambda now: now["running"] == 1)
    os.kill(rank, signal.SIGKILL)
    status, error = under_way.result(PATIENCE)
    assert (status, error["code"]) == (503, "engine_died")
    assert "rank 1 has ended without a word" in error["message"]
    assert served.process.wait(PATIENCE) == 1
    assert "error: rank 1 has ended without a word" in served.said()
    assert "start it again" in served.said()
    assert "Traceback" not in served.said()
    assert gone(engine)


def test_a_divided_model_answers_as_the_whole_one_and_ends_with_a_rank_that_is_killed(server):
    with Served("--tensor-parallel", "2") as divided, ThreadPoolExecutor(1) as pool:
        texts = [each.post("/v1/completions", **GREEDY).json()["choices"][0]["text"] for each in (divided, server)]
        assert texts[0] == texts[1]
        told = divided.figures()
        parts, whole = (
            [each[f'memory_bytes{{rank="{rank}",use="weights"}}'] for rank in ranks]
            for each, ranks in ((told, "01"), (server.figures(), "0"))
        )
        assert parts[0] == parts[1] < 0.6 * whole[0]
        check_a_killed_rank(divided, pool)


@pytest.mark.slow
def test_stages_answer_as_the_whole_model_and_end_with_one_that_is_killed(server):
    with Served("--pipeline-parallel", "2") as cut, ThreadPoolExecutor(1) as pool:
        texts = [each.post("/v1/completions", **GREEDY).json()["choices"][0]["text"] for each in (cut, server)]
        assert texts[0] == texts[1]
        check_a_killed_rank(cut, pool)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_fails_is_told_with_its_reason_and_ends_the_server(rank):
    forking = functools.partial(serve_with_a_failing_rank, rank)
    with Served("--tensor-parallel", "2", forking=forking) as server:
        processes = [server.engine, *children(server.engine)]
        assert len(processes) == 2
        status, error = answer_of(server, LONG)
        assert (status, error["code"]) == (503, "engine_died")
        assert f"rank {rank}: ValueError('a bad shape')" in error["message"]
        assert server.process.wait(PATIENCE) == 1
        assert f"error: rank {rank}: ValueError('a bad shape')" in server.said()
        assert all(gone(each) for each in processes)


@pytest.mark.slow
def test_a_replica_one_of_whose_ranks_fails_is_started_again():
    forking = functools.partial(serve_with_a_failing_rank, 1)
    with Served("--replicas", "2", "--tensor-parallel", "2", "--restarts", "9", "--control", forking=forking) as server:
        first = server.engines
        ranks = [child for engine in first for child in children(engine)]
        assert len(ranks) == 2
        # The other one goes on with it, and fails in its turn.
        answer_of(server, LONG)
        server.until(lambda _: not {*first} & {*server.engines})
        assert all(gone(each) for each in (*first, *ranks))
        assert "rank 1: ValueError('a bad shape')" in server.said()


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_end_with_the_server(way):
    with Served("--tensor-parallel", "2") as server:
        engine = server.engine
        ranks = children(engine)
        assert len(ranks) == 1
        server.process.send_signal(way)
        server.process.wait(PATIENCE)
        assert all(gone(each) for each in (engine, *ranks))
        assert "Traceback" not in server.said()


def test_weights_that_go_away_end_the_server_with_the_name_of_their_file(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(hub.resolve("python-1m"), model)
    with Served("--resident-weights", "3.7MB", "--device", "cpu", model=str(model)) as server:
        assert answer_of(server, GREEDY) == (200, None)
        (model / "model.safetensors").unlink()
        status, error = answer_of(server, GREEDY)
        assert (status, error["code"]) == (503, "engine_died")
        assert f"{model}/model.safetensors is gone" in error["message"]
