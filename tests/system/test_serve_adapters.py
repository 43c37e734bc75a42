"""A server whose clients choose adapters by the name of the model, as they come and go."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.cli._engine import Asked
from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling
from penstock.models.text import stream_text
from programs import penstock
from served import MODEL, Served
from tiny_adapters import written

BODY = {"prompt": "class Stack:\n", "max_tokens": 16, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter's."""
    place = tmp_path_factory.mktemp("adapter") / "sql"
    model = hub.load(MODEL, dtype=torch.float32)
    return written(place, model, 0, rank=4, size=0.1, base_model_name_or_path=MODEL)


@pytest.fixture
def named(server: Served, folder: Path) -> Iterator[str]:
    """What it is called while it is loaded."""
    assert server.post("/adapters", name="sql", folder=str(folder)).json() == {"adapters": ["sql"]}
    yield "sql"
    assert server.http.delete("/adapters/sql").json() == {"adapters": []}


def plain(model: Decoder) -> str:
    """The text of a single sequence, generated without an engine."""
    sampling = Sampling(max_tokens=BODY["max_tokens"], temperature=0)
    return "".join(stream_text(model, hub.load_tokenizer(MODEL), BODY["prompt"], sampling))


def test_a_request_is_answered_by_the_adapter_that_it_names(server: Served, named, folder):
    alone = plain(hub.load(MODEL, dtype=torch.float32).eval())
    merged = plain(hub.load(hub.resolve(folder), dtype=torch.float32).eval())
    assert merged != alone
    for model, text in ((named, merged), (MODEL, alone), (None, alone)):
        found = server.post("/v1/completions", **BODY, model=model).json()
        assert (found["choices"][0]["text"], found["model"]) == (text, model or MODEL)


def test_every_way_to_ask_knows_it(server: Served, named):
    messages = CHAT | {"model": named}
    asked = {
        "/v1/chat/completions": messages,
        "/v1/messages": messages,
        "/v1/responses": {"model": named, "input": "Hi", "max_output_tokens": 4},
    }
    for path, body in asked.items():
        assert server.post(path, **body).json()["model"] == named
    with server.http.stream("POST", "/v1/chat/completions", json={**messages, "stream": True}) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {named}


def test_models_are_listed_with_their_parents(server: Served, named):
    listed = server.http.get("/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in listed] == [(MODEL, None), (named, MODEL)]
    assert server.http.get(f"/v1/models/{named}").json() == listed[1]
    assert server.http.get("/adapters").json() == {"adapters": [named]}


def test_what_is_of_the_model_alone_says_so(server: Served, named):
    search = {"search": {"program": "best_of_n", "scorer": "majority", "budget": 50}}
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/chat/completions", CHAT | search)):
        refused = server.post(path, **body, model=named)
        assert refused.status_code == 400 and "without adapters" in refused.json()["error"]["message"]


def test_what_cannot_be_loaded_or_dropped_is_refused_in_a_line(server: Served, named, folder, tmp_path):
    other = written(tmp_path / "other", hub.load("python-6m"), 0)
    for name, place, why in (
        (named, folder, "there is an adapter 'sql' already"),
        (MODEL, folder, "is what the model is called"),
        (" a", folder, "is no name for an adapter"),
        ("a", tmp_path / "nowhere", "there is no adapter"),
        ("a", other, "it is of another base"),
    ):
        refused = server.post("/adapters", name=name, folder=str(place))
        assert refused.status_code == 400 and why in refused.json()["error"]["message"]
    assert "there is no adapter 'b'" in server.http.delete("/adapters/b").json()["error"]["message"]
    assert server.http.get("/adapters").json() == {"adapters": [named]}
    unknown = server.post("/v1/completions", **BODY, model="b")
    assert unknown.status_code == 404 and "with the adapters sql" in unknown.json()["error"]["message"]


@pytest.mark.slow
def test_the_command_line_opens_with_them(folder, tmp_path):
    with Served("--adapter", f"sql={folder}") as served:
        assert [each["id"] for each in served.http.get("/v1/models").json()["data"]] == [MODEL, "sql"]
        told = served.post("/v1/completions", **BODY, model="sql").json()["choices"][0]["text"]
    lines = [
        {"custom_id": str(model), "method": "POST", "url": "/v1/completions", "body": {**BODY, "model": model}}
        for model in ("sql", MODEL, "other")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = (str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
    done = penstock("batch", MODEL, *files, "--adapter", f"sql={folder}")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["response"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = {each["body"].get("model"): each for each in found}
    assert answers["sql"]["body"]["choices"][0]["text"] == told
    assert answers[MODEL]["status_code"] == 200 and answers[None]["status_code"] == 404


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["sql"], "cannot read --adapter 'sql'"),
        (["a=nowhere"], "there is no adapter 'nowhere'"),
        ([f"{MODEL}=x"], "two models are called"),
    ],
)
def test_what_the_command_line_cannot_read_is_said_before_anything_is_loaded(given, why):
    with pytest.raises(UsageError, match=why):
        Asked({"adapter": given}, ()).config(called=MODEL)


def test_an_adapter_reaches_every_rank_of_every_replica_also_of_one_that_comes_later(folder):
    options = ("--replicas", "2", "--tensor-parallel", "2", "--routing", "round_robin", "--set", "adapter_slots=1")
    merged = plain(hub.load(hub.resolve(folder), dtype=torch.float32).eval())
    with Served(*options, "--control") as server:
        assert server.post("/adapters", name="sql", folder=str(folder)).json() == {"adapters": ["sql"]}
        for killed in (False, True):
            if killed:
                os.kill(server.engines[1], signal.SIGKILL)
                server.until(lambda now: now['replica_restarts_total{replica="1"}'] == 1)
            answers = [server.post("/v1/completions", **BODY, model="sql").json() for _ in range(2)]
            assert [answer["choices"][0]["text"] for answer in answers] == [merged] * 2
            told = [server.http.get(f"/v1/requests/{answer['id']}/events").json() for answer in answers]
            assert {each["continuations"][0]["events"][0]["replica"] for each in told} == {0, 1}
        assert server.http.delete("/adapters/sql").json() == {"adapters": []}
        assert server.post("/v1/completions", **BODY, model="sql").status_code == 404
