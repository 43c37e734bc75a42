"""Why a request took so long, asked by the ids that clients see; and the log, the trace and the metrics of the same."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from served import Served

LONG = {"prompt": ["import os\n", "class Stack:\n"], "n": 2, "max_tokens": 60, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A server that drafts, with room for 16 blocks, half of what four continuations come to; its trace."""
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    options = ["--draft", "ngram", "--set", "controller=fixed", "--set", "cache_tokens=160", "--set", "sequences=4"]
    with Served(*options, "--trace", str(trace), "--log-level", "debug") as served:
        yield served, trace


def story(server: Served, id: str) -> list[dict]:
    answer = server.http.get(f"/v1/requests/{id}/events")
    assert answer.status_code == 200
    assert (answer.json()["id"], answer.json()["object"]) == (id, "request.events")
    return answer.json()["continuations"]


def test_every_prompt_and_continuation_is_told(server):
    answer = server.post("/v1/completions", prompt=["x", "y = "], n=2, max_tokens=3, ignore_eos=True).json()
    told = story(server, answer["id"])
    assert [(each["prompt"], each["index"]) for each in told] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for each in told:
        assert [event["kind"] for event in each["events"]] == ["arrived", "admitted", "first", "finished"]
        assert (each["state"], each["preemptions"]) == ("finished", 0)
        assert 0 <= each["queue_seconds"] <= each["first_token_seconds"] <= each["seconds"]
        assert each["story"][-1].endswith("ended after 3 tokens: length")
    assert [each["prompt"] for each in story(server, answer["id"] + "/1")] == [1, 1]
    newest = server.http.get("/v1/requests", params={"limit": 1}).json()["data"]
    assert [(each["id"], each["states"]) for each in newest] == [(answer["id"], ["finished"] * 4)]


def test_a_chat_a_stream_and_one_that_was_left(server):
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "max_tokens": 2000, "min_tokens": 2000, "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        lines = stream.iter_lines()  # closes the stream when it is forgotten
        first = json.loads(next(lines).removeprefix("data: "))
        assert story(server, first["id"])[0]["state"] in ("waiting", "running")
    # The server learns that the client has left, then the engine; its events come back with its next news.
    while story(server, first["id"])[0]["state"] != "finished":
        time.sleep(0.01)
    assert story(server, first["id"])[0]["story"][-1].endswith(": abort")


def test_what_is_not_known_is_404_and_says_where_to_look(server):
    for id in ("cmpl-1", "a/b/c", "é", "cmpl-" + "1" * 500):
        answer = server.http.get(f"/v1/requests/{id}/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found")
        assert "GET /v1/requests has the newest" in answer.json()["error"]["message"]
    assert server.http.get("/v1/requests?limit=0").status_code == 400
    for path in ("/v1/requests", "/v1/requests/cmpl-1/events"):
        assert server.http.get(path, headers={"authorization": "Bearer no"}).status_code == 401


def test_who_was_preempted_by_whom_and_for_how_long(crowded):
    server, trace = crowded
    before = server.until_idle()
    with ThreadPoolExecutor(2) as pool:
        answers = [each.result() for each in [pool.submit(server.post, "/v1/completions", **LONG) for _ in range(2)]]
    ids = [answer.json()["id"] for answer in answers]
    told = {f"{id}/{each['prompt']}": each for id in ids for each in story(server, id)}
    after = server.until_idle()
    every = [each for id in ids for each in story(server, id)]
    preemptions = [event for each in every for event in each["events"] if event["kind"] == "preempted"]
    assert len(preemptions) == sum(each["preemptions"] for each in every)
    assert len(preemptions) == after["preemptions_total"] - before["preemptions_total"] > 0
    assert {event["by"] for event in preemptions} <= set(told)
    waited = [each["preempted_seconds"] for each in every if each["preemptions"]]
    assert min(waited) > 0
    assert after["queue_seconds_count"] - before["queue_seconds_count"] == len(every) == 8
    assert after["queue_seconds_sum"] - before["queue_seconds_sum"] == pytest.approx(
        sum(each["queue_seconds"] for each in every), abs=1e-3
    )
    # The log has each decision, the trace what it leads to.
    lines = [json.loads(line) for line in server.said().splitlines() if line.startswith("{")]
    logged = [line["event"] for line in lines if line["logger"] == "penstock.events"]
    assert sum(event["kind"] == "preempted" and event["id"] in told for event in logged) == len(preemptions)
    assert all(line["level"] and line["time"] and line["message"] for line in lines)
    drawn = json.loads(trace.read_text() + "]")
    tracks = {event["tid"] for event in drawn if event.get("name") == "thread_name" and event["args"]["name"] in told}
    spans = [event["name"] for event in drawn if event["ph"] == "B" and event["tid"] in tracks]
    assert "preempted" in spans
    assert {event["name"] for event in drawn if event["ph"] == "C"} == {"sequences", "blocks held"}


def test_drafts_change_no_token_and_are_counted(crowded):
    server, _ = crowded
    body = {"prompt": "x = [1, 2, 3, 1, 2, 3, 1, 2,", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    before = server.until_idle()
    told = []
    for drafts in (True, False):
        answer = server.post("/v1/completions", **body, drafts=drafts, logprobs=0).json()
        told.append((answer["choices"][0]["text"], story(server, answer["id"])[0], answer["choices"][0]["logprobs"]))
    after = server.until_idle()
    (text, with_drafts, logprobs), (plain, without, expected) = told
    assert text == plain
    assert logprobs["tokens"] == expected["tokens"]
    assert with_drafts["drafted_tokens"] >= with_drafts["accepted_tokens"] > 0
    assert without["drafted_tokens"] == 0
    for name in ("drafted_tokens", "accepted_tokens"):
        assert after[f"{name}_total"] - before[f"{name}_total"] == with_drafts[name]
    # A stop string is found in the midst of what one step brings.
    for stop in {text[start : start + 3] for start in range(5, len(text) - 3, 7)}:
        for stream in (False, True):
            answer = server.http.post("/v1/completions", json=body | {"stop": stop, "stream": stream}).text
            chunks = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.endswith("}")]
            choices = [chunk["choices"][0] for chunk in chunks]
            assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
            assert choices[-1]["finish_reason"] == "stop"


def test_the_trace_of_a_killed_server_opens(crowded):
    server, trace = crowded
    server.process.kill()
    server.process.wait()
    drawn = json.loads(trace.read_text() + "]")
    assert len(drawn) > 50
    assert all({"ph", "pid", "tid"} <= event.keys() for event in drawn)
