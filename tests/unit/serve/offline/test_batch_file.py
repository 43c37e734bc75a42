"""OpenAI batch files on a boxed model."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from penstock import LLM, SamplingParams
from penstock.core.errors import UsageError
from penstock.core.files import claim
from penstock.core.progress import silent
from penstock.models import hub
from penstock.serve.http.shapes.completions import Completions
from penstock.serve.http.text import Tokens
from penstock.serve.offline.batch_file import BatchRun, Summary
from penstock.serve.offline.gather import Gatherer
from penstock.serve.offline.vectors import LineVectors
from penstock.serve.reader import Reader


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("python-1m", device="cpu", batching="batchllm", sequences=8, tokens=64, cache_tokens=2048, check=True)


@pytest.fixture
def answer(llm, tmp_path):
    """Answers the lines of an input, given as records or as raw bytes; returns the summary and the output's records."""

    def run(*lines, window: int = 4, target: Path = tmp_path / "out.jsonl"):
        raw = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        (tmp_path / "in.jsonl").write_bytes(raw)
        runner = BatchRun(
            Gatherer(llm.engine, llm.tokenizer),
            Tokens(llm.tokenizer),
            "python-1m",
            window,
            LineVectors(llm.engine, hub.resolve("python-1m"), Tokens(llm.tokenizer), llm.tokenizer),
        )
        summary = runner.run(tmp_path / "in.jsonl", target)
        assert not llm.engine.busy
        assert llm.engine.memory.pool.held == 0
        return summary, [json.loads(line) for line in target.read_text().splitlines()]

    return run


def completion(custom_id: str, prompt="def add(", **body) -> dict:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def by_id(records) -> dict:
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records)
    return found


def test_every_line_is_answered_in_openai_s_format(answer, llm):
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    lines = [completion(str(n), prompt=f"def f{n}(") for n in range(9)]
    lines.append({"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat})
    summary, records = answer(*lines)
    assert summary == Summary(before=0, done=10, refused=0, stopped=False)
    found = by_id(records)
    assert {record["id"] for record in records} == {f"batch_req_{n}" for n in range(10)}
    want = llm.generate([f"def f{n}(" for n in range(9)], SamplingParams(temperature=0, max_tokens=6), progress=silent)
    for number, result in enumerate(want):
        response = found[str(number)]["response"]
        assert found[str(number)]["error"] is None
        assert response["status_code"] == 200
        choice = response["body"]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (result.outputs[0].text, "length")
        assert response["body"]["usage"]["prompt_tokens"] == len(result.prompt_token_ids)
        assert response["body"]["usage"]["completion_tokens"] == 6
    body = found["chat"]["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"


def test_the_openai_package_reads_the_bodies(answer):
    openai = pytest.importorskip("openai.types")
    _, records = answer(completion("a", n=2, temperature=1, logprobs=2), completion("b", ["x = ", "y = "]))
    for record in records:
        found = openai.Completion.model_validate(record["response"]["body"])
        assert [choice.index for choice in found.choices] == [0, 1]


def test_an_echo_is_rated_too(answer):
    _, records = answer(completion("a", logprobs=2, echo=True))
    (choice,) = records[0]["response"]["body"]["choices"]
    rated = choice["logprobs"]
    assert choice["text"].startswith("def add(")
    assert "".join(rated["tokens"]) == choice["text"]
    assert rated["token_logprobs"][0] is None
    assert all(len(top) in (2, 3) for top in rated["top_logprobs"][1:])
    assert all(logprob < 0 for logprob in rated["token_logprobs"][1:])


def test_texts_of_one_row_are_choices_of_a_line(answer, llm):
    _, records = answer(completion("a", n=3, rule="superposed", logprobs=1), completion("b"))
    body = by_id(records)["a"]["response"]["body"]
    (wanted,) = llm.generate(
        "def add(", SamplingParams(temperature=0, max_tokens=6, n=3, rule="superposed"), progress=silent
    )
    assert [choice["text"] for choice in body["choices"]] == [output.text for output in wanted.outputs]
    assert len({choice["text"] for choice in body["choices"]}) == 3
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [6, 6, 6]
    assert body["usage"]["completion_tokens"] == 18


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "deep"),
        (b"[1]", "not a JSON object"),
        (b'{"custom_id": NaN}', "NaN"),
        ({"custom_id": "x"}, "required"),
        (completion("x") | {"methud": 1}, "did you mean 'method'"),
        (completion("x") | {"url": "/v1/responses"}, "or '/v1/embeddings' (got '/v1/responses')"),
        (completion("x") | {"custom_id": 7}, "custom_id"),
    ],
)
def test_a_line_that_cannot_be_read_is_answered_with_an_error(answer, line, message):
    summary, records = answer(completion("a"), line, completion("b"))
    assert summary == Summary(before=0, done=3, refused=1, stopped=False, reason=summary.reason)
    assert message in summary.reason
    (error,) = (record for record in records if record["error"])
    assert error["id"] == "batch_req_1"
    assert error["response"] is None
    assert error["error"]["code"] == "invalid_line"
    assert message in error["error"]["message"]
    assert answer(completion("a"), line, completion("b"))[0] == Summary(before=3, done=0, refused=0, stopped=False)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": [1] * 5000}, 400, "5000 tokens"),
        ({"prompt": ["fine", [3, 99999]]}, 400, "prompt"),
        ({"prompt": [[3, 4], [3, 99999]]}, 400, "vocabulary"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 1e30}, 400, "temperature"),
        ({"max_token": 3}, 400, "did you mean 'max_tokens'"),
        ({"stop": ["x"] * 99}, 400, "stop"),
        ({"stream": True}, 400, "nothing to stream"),
        ({"model": "gpt-4o"}, 404, "there is no model 'gpt-4o'"),
    ],
)
def test_a_request_that_is_refused_is_answered_as_the_server_answers(answer, body, status, message):
    summary, records = answer(completion("a"), completion("x", **body), completion("b"))
    assert summary.refused == 1
    assert message in summary.reason
    response = by_id(records)["x"]["response"]
    assert response["status_code"] == status
    assert message in response["body"]["error"]["message"]
    assert all(by_id(records)[id]["response"]["status_code"] == 200 for id in "ab")


@pytest.mark.parametrize(
    ("place", "name", "poisonous"),
    [
        (Tokens, "encode", lambda tokens, text, *_: text == "import os"),
        (Reader, "read", lambda reader, delta: delta.id == "1/0"),
        (Completions, "choice", lambda shapes, piece: shapes._echoes),
    ],
)
def test_a_line_that_fails_in_a_way_that_nobody_foresaw_ends_alone(answer, monkeypatch, place, name, poisonous):
    """At any stage; and it is answered, so that the next run does not meet it again."""
    whole = getattr(place, name)

    def failing(*given):
        if poisonous(*given):
            raise RuntimeError("Invalid prefix")
        return whole(*given)

    monkeypatch.setattr(place, name, failing)
    lines = [completion("a"), completion("x", prompt="import os", echo=True), completion("b")]
    summary, records = answer(*lines)
    assert (summary.done, summary.refused, summary.reason) == (3, 1, "the request failed: RuntimeError: Invalid prefix")
    response = by_id(records)["x"]["response"]
    assert (response["status_code"], response["body"]["error"]["message"]) == (500, summary.reason)
    assert all(by_id(records)[id]["response"]["status_code"] == 200 for id in "ab")
    assert answer(*lines)[0].done == 0


def test_blank_lines_are_passed_over(answer):
    summary, records = answer(b"", completion("a"), b"  ", completion("b"), b"")
    assert summary.done == len(records) == 2


def test_the_same_line_gives_the_same_text_whatever_the_window(answer, tmp_path):
    lines = [completion(str(n), prompt="import ", temperature=1.0) for n in range(6)]
    texts = []
    for window in (1, 100):
        _, records = answer(*lines, window=window, target=tmp_path / f"{window}.jsonl")
        texts.append({id: each["response"]["body"]["choices"][0]["text"] for id, each in by_id(records).items()})
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 1, "every line has draws of its own"


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_last_line_is_done_again(answer, tmp_path, cut):
    lines = [completion(str(n)) for n in range(4)]
    _, records = answer(*lines)
    target = tmp_path / "out.jsonl"
    whole = target.read_bytes()
    torn = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(torn[:2]) + torn[2][:cut])
    summary, again = answer(*lines)
    assert summary == Summary(before=2, done=2, refused=0, stopped=False)
    assert again[:2] == records[:2]
    assert set(by_id(again)) == set("0123")
    assert answer(*lines)[0].done == 0


@pytest.mark.parametrize(
    "content", ["precious", "precious\n", '{"id": "x", "custom_id": 1}\n', '{"no": "id"}\n', "[]\n"]
)
def test_a_file_of_somebody_else_is_left_alone(answer, tmp_path, content):
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(UsageError, match="line 1 is none of a batch's output"):
        answer(completion("a"))
    assert (tmp_path / "out.jsonl").read_text() == content


def test_the_output_of_another_input_is_left_alone(answer, tmp_path):
    answer(completion("a"), completion("b"))
    before = (tmp_path / "out.jsonl").read_bytes()
    for other in ([completion("a"), completion("c")], [completion("a")]):
        with pytest.raises(UsageError, match="answers another input"):
            answer(*other)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_one_process_at_a_time(answer, tmp_path):
    (tmp_path / "out.jsonl").touch()
    with claim(tmp_path / "out.jsonl"), pytest.raises(UsageError, match="another process"):
        answer(completion("a"))


def test_asked_to_stop_it_keeps_what_is_done_and_goes_on_later(answer):
    lines = [completion(str(n), max_tokens=4 + 40 * (n > 1)) for n in range(12)]
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    summary, records = answer(*lines)
    timer.join()
    assert summary.stopped
    assert len(records) == summary.done < 12
    rest, records = answer(*lines)
    assert (rest.before, rest.before + rest.done, rest.stopped) == (summary.done, 12, False)
    assert len(by_id(records)) == 12


def test_lines_that_ask_for_vectors_have_those_of_the_model(answer, llm):
    def asking(custom_id: str, **body) -> dict:
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}

    texts = ["def add(a, b):", "import os"]
    summary, records = answer(
        asking("floats", input=texts, model="python-1m"),
        completion("text"),
        asking("bytes", input=texts[1], encoding_format="base64"),
        asking("tokens", input=llm.tokenizer("import os")["input_ids"]),
        asking("empty", input=""),
        asking("short", input="x", dimensions=3),
        asking("other", input="x", model="gpt"),
    )
    found = by_id(records)
    assert (summary.done, summary.refused) == (7, 3)
    wanted = llm.embed(texts, progress=silent).numpy()
    body = found["floats"]["response"]["body"]
    np.testing.assert_allclose([each["embedding"] for each in body["data"]], wanted, atol=1e-5)
    assert body["usage"]["prompt_tokens"] == sum(len(ids) for ids in llm.tokenizer(texts)["input_ids"])
    (packed,) = found["bytes"]["response"]["body"]["data"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed["embedding"]), "<f4"), wanted[1], atol=1e-5)
    (same,) = found["tokens"]["response"]["body"]["data"]
    np.testing.assert_allclose(same["embedding"], wanted[1], atol=1e-5)
    assert found["text"]["response"]["body"]["choices"][0]["text"]
    reasons = [found[name]["response"]["body"]["error"]["message"] for name in ("empty", "short", "other")]
    assert "empty" in reasons[0] and "cannot be cut" in reasons[1] and "'gpt'" in reasons[2]
