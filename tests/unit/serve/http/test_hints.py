"""Fields beyond OpenAI's: what they ask of the engine, and what they add to an answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from in_process import Engine, asked, tokens
from penstock.models import hub
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.completions import Completion
from penstock.serve.http.text import Tokens

USER = {"role": "user", "content": "def f"}


def completion(engine: Engine | None = None, **body: Any) -> dict[str, Any]:
    return answered(asked("/v1/completions", engine=engine, strict=True, json={"prompt": "def f", **body}))


def chat(engine: Engine | None = None, **body: Any) -> dict[str, Any]:
    return answered(asked("/v1/chat/completions", engine=engine, strict=True, json={"messages": [USER], **body}))


def answered(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(path: str, **body: Any) -> str:
    answer = asked(path, json=body)
    assert answer.status_code == 400
    return answer.json()["error"]["message"]


def sampled(**body: Any):
    """What a completion asks of the engine."""
    engine = Engine([300])
    completion(engine, **body)
    return engine.requests[0].sampling


def ids(text: str) -> list[int]:
    return tokens().encode(text, False)


@pytest.mark.parametrize("most", [-1, 0, None])
def test_no_limit_of_top_k(most):
    assert sampled(top_k=most).top_k is None
    assert sampled(top_k=5).top_k == 5


@pytest.mark.parametrize(
    ("body", "name", "text"),
    [
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "json_schema", '{"type": "integer"}'),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "json_schema", '{"type": "integer"}'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "ebnf", 'root ::= "a"'),
        ({"structured_outputs": {"choice": ["a", 'b"\n']}}, "ebnf", r'start: "a" | "b\"\n"'),
        ({"structured_outputs": {"json_object": True}}, "json_object", True),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_json": {"type": "integer"}}, "json_schema", '{"type": "integer"}'),
        ({"guided_choice": ["a", "b"]}, "ebnf", 'start: "a" | "b"'),
        ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"response_format": {"type": "json_object"}}, "json_object", True),
    ],
)
def test_what_an_answer_must_be_can_be_said_in_three_ways(body, name, text):
    assert getattr(sampled(**body).grammar, name) == text
    engine = Engine([300])
    chat(engine, **body)
    assert getattr(engine.requests[0].sampling.grammar, name) == text


def test_a_request_can_keep_all_of_its_cache():
    assert sampled().kv is None
    assert sampled(kv="full").kv == "full"
    assert "'full'" in refused("/v1/completions", prompt="x", kv="h2o")


def test_words_and_tokens_that_may_not_come():
    asked_for = sampled(allowed_token_ids=[5, 300], bad_words=["def"])
    assert asked_for.allowed_tokens == (5, 300)
    assert asked_for.bad_words == (tuple(ids("def")), tuple(ids(" def")))
    assert "allowed_token_ids" in refused("/v1/completions", prompt="x", allowed_token_ids=[])
    assert "token 9999 is outside" in refused("/v1/completions", prompt="x", allowed_token_ids=[9999])
    assert "bad_words" in refused("/v1/completions", prompt="x", bad_words=[""])


def test_what_an_answer_must_be_is_said_once():
    message = refused("/v1/completions", prompt="x", guided_regex="a", response_format={"type": "json_object"})
    assert "not by response_format and guided_regex" in message
    assert "exactly one of json" in refused("/v1/completions", prompt="x", structured_outputs={})


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_can_be_part_of_the_text(stream):
    said = ids(" one two three")
    for wanted, text in [(True, " one two"), (False, " one ")]:
        body = {"prompt": "def", "stop": ["two"], "include_stop_str_in_output": wanted, "stream": stream}
        answer = asked("/v1/completions", engine=Engine(said), json=body)
        if stream:
            told = "".join(each["text"] for each in choices(answer))
            end = choices(answer)[-1]
        else:
            end = answer.json()["choices"][0]
            told = end["text"]
        assert (told, end["finish_reason"], end["stop_reason"]) == (text, "stop", "two")


def choices(answer: httpx.Response) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    return [choice for chunk in chunks(answer) for choice in chunk["choices"]]


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_special_tokens_are_text_where_they_are_not_skipped():
    (special, written), *_ = tokens().specials.items()
    said = [*ids(" one"), special, *ids(" two")]
    assert completion(Engine(said))["choices"][0]["text"] == " one two"
    assert completion(Engine(said), skip_special_tokens=False)["choices"][0]["text"] == f" one{written} two"
    assert chat(Engine(said), skip_special_tokens=False)["choices"][0]["message"]["content"] == f" one{written} two"


def test_tokens_are_told():
    said = ids(" one two")
    choice = completion(Engine(said), prompt=["def f", "x"], return_token_ids=True)["choices"][1]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (tokens().encode("x"), said)
    answer = chat(Engine(said), return_token_ids=True)
    assert answer["prompt_token_ids"] == tokens().encode("user: def f\nassistant:", False)
    assert answer["choices"][0]["token_ids"] == said
    assert "token_ids" not in completion(Engine(said))["choices"][0]


def test_tokens_are_told_in_streams():
    said = ids(" one two")
    body = {"stream": True, "return_token_ids": True}
    parts = choices(asked("/v1/completions", engine=Engine(said), json={"prompt": "def f", **body}))
    assert [token for part in parts for token in part["token_ids"]] == said
    assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == [tokens().encode("def f")]
    answer = asked("/v1/chat/completions", engine=Engine(said), json={"messages": [USER], **body})
    assert [token for part in choices(answer) for token in part.get("token_ids", [])] == said
    written = tokens().encode("user: def f\nassistant:", False)
    assert [each["prompt_token_ids"] for each in chunks(answer) if "prompt_token_ids" in each] == [written]


@pytest.mark.parametrize(("most", "kept"), [(2, 2), (1000, 5), (-1, 5)])
def test_the_end_of_a_prompt_is_read(most, kept):
    engine, prompt = Engine([300]), [5, 6, 7, 8, 9]
    completion(engine, prompt=prompt, truncate_prompt_tokens=most)
    assert engine.requests[0].prompt == prompt[-kept:]


@pytest.mark.parametrize(("wanted", "kept"), [(0, 2047), (1, 2047), (16, 2032), (1024, 1024), (4000, 1024)])
def test_a_prompt_beyond_the_context_is_cut_to_what_leaves_room_for_the_answer(wanted, kept):
    prompt = list(range(3000))
    assert (
        Completion(prompt="x", truncate_prompt_tokens=-1, max_tokens=wanted).truncated(prompt, 2048) == prompt[-kept:]
    )
    chat = {"messages": [USER], "truncate_prompt_tokens": -1}
    assert Chat.model_validate(chat | {"max_completion_tokens": wanted}).truncated(prompt, 2048) == prompt[-kept:]
    assert Chat.model_validate(chat).truncated(prompt, 2048) == prompt[-1024:]


def test_the_tokens_that_a_model_wants_around_a_text():
    own = hub.load_tokenizer("python-1m")
    own.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    bare = {"/v1/completions": ids("def f"), "/v1/chat/completions": ids("user: def f\nassistant:")}
    for path, body in {"/v1/completions": {"prompt": "def f"}, "/v1/chat/completions": {"messages": [USER]}}.items():
        for special in (None, False, True):
            engine = Engine([300])
            answered(asked(path, engine=engine, tokenizer=Tokens(own), json=body | {"add_special_tokens": special}))
            around = path == "/v1/completions" if special is None else special
            assert engine.requests[0].prompt == [0] * around + bare[path]


def test_a_message_that_the_assistant_began_is_gone_on_with():
    engine = Engine([300])
    began = {"role": "assistant", "content": "def g"}
    chat(engine, messages=[USER, began], continue_final_message=True)
    assert tokens().decode(engine.requests[0].prompt) == "user: def f\nassistant: def g"
    chat(engine, add_generation_prompt=False)
    assert tokens().decode(engine.requests[1].prompt) == "user: def f\n"
    path = "/v1/chat/completions"
    assert "the last is none" in refused(path, messages=[USER], continue_final_message=True)
    assert "--request-templates" in refused(path, messages=[USER], chat_template="{{ 1 }}")
    assert "top_logprobs needs logprobs" in refused(path, messages=[USER], top_logprobs=2)


def test_no_tokens_are_wanted():
    engine = Engine([300])
    answer = completion(engine, max_tokens=0, echo=True)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("def f", "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.requests[0].sampling.max_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_one_call_ends_the_answer_where_one_is_wanted(stream, parallel):
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    engine = Engine(ids(call + call + call))
    tools = [{"type": "function", "function": {"name": "now"}}]
    body = {"messages": [USER], "tools": tools, "parallel_tool_calls": parallel, "stream": stream}
    answer = asked("/v1/chat/completions", engine=engine, json=body)
    if stream:
        found = [made for each in choices(answer) for made in each["delta"].get("tool_calls", []) if "id" in made]
        end = choices(answer)[-1]
    else:
        (end,) = answer.json()["choices"]
        found = end["message"]["tool_calls"]
        assert (answer.json()["usage"]["completion_tokens"] < len(ids(call + call))) == (not parallel)
    assert len(found) == (3 if parallel else 1)
    assert end["finish_reason"] == ("length" if parallel else "tool_calls")
    assert bool(engine.aborted) == (not parallel)
