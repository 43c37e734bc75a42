"""A search over HTTP: a field of a chat, which spends a budget in the engine's process beside other requests."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import openai
import pytest

from penstock import LLM, SamplingParams
from penstock.core.progress import silent
from served import MODEL

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text()
CHAT = {"messages": [{"role": "user", "content": "def add(a, b):"}], "seed": 3, "max_tokens": 24}


def test_it_is_the_search_that_a_process_of_ones_own_does(server):
    """The same tree with the same ledger; usage counts all that was spent."""
    wanted = {"program": "best_of_n", "options": {"n": 4}, "budget": 60, "scorer": "self_certainty"}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret-1", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=MODEL, extra_body={"search": wanted}, temperature=1.0, **{**CHAT, "stop": ["\n\n\n"]}
        )
    llm = LLM(MODEL, progress=silent, cache_tokens=8192)
    (own,) = llm.search(
        {"messages": CHAT["messages"]},
        {"name": "best_of_n", "n": 4},
        scorer="self_certainty",
        budget=60,
        sampling_params=SamplingParams(seed=3, max_tokens=24, stop=("\n\n\n",)),
        progress=silent,
    )
    assert own.error is None and answer.choices[0].message.content == own.text
    told = answer.model_extra["search"]
    for name in ("generated", "tokens", "prompt", "forks", "scorings", "flops"):
        assert told["ledger"][name] == own.ledger.record()[name], name
    assert told["score"] == pytest.approx(own.score) and told["exhausted"] == own.exhausted
    assert answer.usage.completion_tokens == own.ledger.generated <= 60
    assert answer.usage.prompt_tokens == own.ledger.prompt
    assert not server.until_idle()["cache_blocks_held"]


def test_the_documents_example_is_answered(server):
    """The body that the page gives to curl."""
    (printed,) = re.findall(
        r"curl http://127.0.0.1:8000/v1/chat/completions.*? -d '(\{.*?\})'$", PAGE, re.DOTALL | re.M
    )
    body = json.loads(printed) | {"model": MODEL}
    answer = server.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["choices"][0]["message"]["content"] is not None
    assert 0 < found["usage"]["completion_tokens"] == found["search"]["ledger"]["generated"] <= body["search"]["budget"]


#: Options that are within their limits, and multiply.
WIDE = {"trees": 256, "expand": 256}


@pytest.mark.parametrize(
    ("changed", "param", "said"),
    [
        ({"search": {}}, "search", "Field required"),
        ({"search": {"budget": 0}}, "search", "greater than or equal to 1"),
        ({"search": {"budget": 10**9}}, "search", "may spend 100,000 tokens"),
        ({"search": {"budget": 9, "program": "bean"}}, "search", "did you mean 'beam'"),
        ({"search": {"budget": 9, "options": {"n": 10**9}}}, "search", "less than or equal to 256"),
        ({"search": {"budget": 9, "options": {"n": "x"}}}, "search", "valid"),
        ({"search": {"budget": 9, "options": {"nn": 1}}}, "search", "nn"),
        ({"search": {"budget": 9, "scorer": "unit_tests"}}, "search", "is not offered here"),
        ({"search": {"budget": 9, "scorer": "/etc/passwd"}}, "search", "is not offered here"),
        ({"search": {"budget": 9, "unit": "flops"}}, "search", "'generated' or 'tokens'"),
        ({"search": {"budget": 9, "program": "cascade"}}, "search", "asks the model 'strong'"),
        ({"search": {"budget": 300, "program": "dvts", "options": WIDE}}, "search", "may have 1,024"),
        ({"search": {"budget": 9}, "stream": True}, "stream", "answered without stream"),
        ({"search": {"budget": 9}, "n": 2}, "n", "leave out n"),
        ({"search": {"budget": 9}, "logprobs": True}, "logprobs", "answered without logprobs"),
    ],
)
def test_what_cannot_be_searched_is_refused(server, changed, param, said):
    answer = server.post("/v1/chat/completions", **{**CHAT, **changed})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"], error
    assert param is None or error["param"] == param, error
    assert not server.until_idle()["cache_blocks_held"]


def test_a_search_leaves_others_alone_and_ends_when_it_is_told_to(server):
    """A plain request beside it gets what it gets alone; a search that is ended answers with what it has."""
    plain = {"prompt": "class Stack:", "max_tokens": 16, "temperature": 0}
    alone = server.post("/v1/completions", **plain).json()["choices"][0]["text"]
    long = {"program": "until_accepted", "budget": 50_000, "scorer": "exact_match", "problem": {"answer": "?"}}
    found = []

    def searched() -> None:
        found.append(server.post("/v1/chat/completions", **{**CHAT, "search": long}))

    thread = threading.Thread(target=searched)
    thread.start()
    server.until(lambda now: now["running"] > 0)
    assert server.post("/v1/completions", **plain).json()["choices"][0]["text"] == alone
    listed = server.http.get("/v1/requests").json()["data"]
    id = next(each["id"] for each in listed if set(each["states"]) != {"finished"})
    assert server.http.delete(f"/v1/requests/{id}").status_code == 200
    thread.join(60)
    (answer,) = found
    assert answer.status_code == 200, answer.text
    assert 0 < answer.json()["usage"]["completion_tokens"] < 50_000
    assert not server.until_idle()["cache_blocks_held"]
