"""Fields beyond OpenAI's as clients meet them: each by itself, over completions and chats, whole and streamed."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.models import hub
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.completions import Completion
from served import MODEL, Served

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
ASKED = {COMPLETIONS: {"prompt": "x = "}, CHATS: {"messages": [{"role": "user", "content": "x = "}]}}
END = "<|endoftext|>"

everywhere = pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
whole_and_streamed = pytest.mark.parametrize("stream", [False, True])


def told(server: Served, path: str, stream: bool = False, headers: dict[str, str] | None = None, **body: Any) -> Any:
    """The first choice of an answer, whole or put together from its stream, and what is told beside it."""
    given = ASKED[path] | {"max_tokens": 6, "seed": 1, "stream": stream} | body
    if stream:
        given["stream_options"] = {"include_usage": True}
    answer = server.http.post(path, json=given, headers=headers)
    assert answer.status_code == 200, answer.text
    assert "penstock-ignored" not in answer.headers
    lines = answer.text.splitlines() if stream else [f"data: {answer.text}"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    found = SimpleNamespace(text="", tokens=[], prompt=None, prompt_logprobs=None, finish=None, stopped=None)
    found.id, found.headers, found.usage = chunks[0]["id"], answer.headers, chunks[-1]["usage"]
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"]:
                continue
            said = choice.get("delta", choice.get("message", {}))
            found.text += choice.get("text") or said.get("content") or ""
            found.tokens += choice.get("token_ids", [])
            found.finish = choice["finish_reason"] or found.finish
            found.stopped = choice.get("stop_reason") or found.stopped
            for part in (chunk, choice):
                found.prompt = part.get("prompt_token_ids") or found.prompt
                found.prompt_logprobs = part.get("prompt_logprobs") or found.prompt_logprobs
    return found


def tokens(server: Served, **body: Any) -> list[int]:
    return server.post("/tokenize", **body).json()["tokens"]


def text(server: Served, ids: list[int]) -> str:
    return server.post("/detokenize", tokens=ids).json()["prompt"]


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
OBJECT = r'\{\s*"a"\s*:\s*[12]\s*\}'


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, OBJECT),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, OBJECT),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"structured_outputs": {"grammar": 'root ::= "a" "b"+ "c"'}}, "ab+c"),
        ({"structured_outputs": {"json_object": True}}, r"\{(.|\n)*"),
        ({"guided_json": SCHEMA}, OBJECT),
        ({"guided_regex": "[0-9]{3}", "guided_choice": None, "structured_outputs": None}, "[0-9]{3}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_grammar": 'start: "a" "b" "c"'}, "abc"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, OBJECT),
        ({"response_format": {"type": "json_object"}}, r"\{(.|\n)*"),
        ({"response_format": {"type": "regex", "regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"response_format": {"type": "ebnf", "ebnf": 'start: "abc"'}}, "abc"),
        ({"response_format": {"type": "text"}, "guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"response_format": {"type": "text"}}, r"(.|\n)+"),
    ],
)
@everywhere
@whole_and_streamed
def test_an_answer_takes_its_form(server, path, stream, fields, form):
    assert re.fullmatch(form, told(server, path, stream, max_tokens=24, **fields).text)


@everywhere
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("most", [0, 3])
def test_log_probabilities_of_the_prompt_are_streamed(server, path, n, most):
    whole, streamed = (told(server, path, each, prompt_logprobs=2, n=n, max_tokens=most) for each in (False, True))
    first, *others = whole.prompt_logprobs
    assert first is None
    assert len(others) == whole.usage["prompt_tokens"] - 1
    for one, other in zip(others, streamed.prompt_logprobs[1:], strict=True):
        assert one.keys() == other.keys()
        assert [each["logprob"] for each in one.values()] == pytest.approx(
            [each["logprob"] for each in other.values()], abs=1e-4
        )


@everywhere
@whole_and_streamed
def test_no_token_is_generated(server, path, stream):
    found = told(server, path, stream, max_tokens=0, return_token_ids=True)
    assert (found.text, found.tokens, found.finish, found.usage["completion_tokens"]) == ("", [], "length", 0)
    assert found.usage["prompt_tokens"] == len(found.prompt)


@whole_and_streamed
def test_no_token_by_its_newer_name(server, stream):
    found = told(server, CHATS, stream, max_tokens=None, max_completion_tokens=0)
    assert (found.text, found.usage["completion_tokens"]) == ("", 0)


@everywhere
@whole_and_streamed
def test_tokens_are_told(server, path, stream):
    found = told(server, path, stream, return_token_ids=True, ignore_eos=True)
    assert len(found.tokens) == 6
    assert text(server, found.prompt + found.tokens) == text(server, found.prompt) + found.text
    assert found.prompt == tokens(server, **ASKED[path])


@everywhere
@whole_and_streamed
def test_tokens_and_words_that_may_come(server, path, stream):
    allowed = tokens(server, prompt="(")[:1] + tokens(server, prompt=")")[:1]
    assert set(told(server, path, stream, allowed_token_ids=allowed, return_token_ids=True).tokens) <= set(allowed)
    free = told(server, path, stream, temperature=0, max_tokens=12, return_token_ids=True)
    words = [text(server, [token]) for token in free.tokens if text(server, [token]).strip()]
    held = told(server, path, stream, temperature=0, max_tokens=12, return_token_ids=True, bad_words=words)
    banned = {tuple(tokens(server, prompt=word, add_special_tokens=False)) for word in words}
    assert free.tokens != held.tokens
    assert not banned & {(token,) for token in held.tokens}


@everywhere
@whole_and_streamed
def test_what_ended_the_text_is_told_and_may_be_part_of_it(server, path, stream):
    free = told(server, path, temperature=0, max_tokens=12, return_token_ids=True, ignore_eos=True)
    last = free.tokens[4]
    until = free.tokens[: free.tokens.index(last)]
    before = text(server, free.prompt + until).removeprefix(text(server, free.prompt))
    ask = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    for included, after in ((False, ""), (True, text(server, [last]))):
        found = told(server, path, stream, stop_token_ids=[last], include_stop_str_in_output=included, **ask)
        assert (found.text, found.stopped, found.finish) == (before + after, last, "stop")
        assert found.tokens == [*until, last]
        stop = free.text[3:5]
        found = told(server, path, stream, stop=[stop], include_stop_str_in_output=included, **ask)
        cut = free.text[: free.text.index(stop)] + (stop if included else "")
        assert (found.text, found.stopped, found.finish) == (cut, stop, "stop")


@everywhere
@whole_and_streamed
def test_special_tokens_may_be_part_of_the_text(server, path, stream):
    (end,) = tokens(server, prompt=END)
    ask = {"allowed_token_ids": [end], "ignore_eos": True, "max_tokens": 2}
    assert told(server, path, stream, **ask).text == ""
    assert told(server, path, stream, **ask, skip_special_tokens=False).text == 2 * END


@everywhere
@whole_and_streamed
def test_the_end_of_a_prompt_is_read(server, path, stream):
    all_of_it = told(server, path, stream, return_token_ids=True).prompt
    assert told(server, path, stream, return_token_ids=True, truncate_prompt_tokens=2).prompt == all_of_it[-2:]
    long = "x " * 3000
    body = {"prompt": long} if path == COMPLETIONS else {"messages": [{"role": "user", "content": long}]}
    found = told(server, path, stream, **body, return_token_ids=True, truncate_prompt_tokens=-1, ignore_eos=True)
    assert (len(found.prompt), len(found.tokens)) == (2048 - 6, 6)


@everywhere
@pytest.mark.parametrize("most", [0, -1, None])
def test_no_limit_of_the_most_probable(server, path, most):
    assert told(server, path, top_k=most).text == told(server, path).text
    assert told(server, path, top_k=1).text == told(server, path, temperature=0).text


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    "{{ mood }}{{ facts and facts[0].a }}{% if add_generation_prompt %}\n[assistant]{% endif %}"
)
BEGAN = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y ="}]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": BEGAN, "continue_final_message": True},
        {"messages": BEGAN, "continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True},
        {"chat_template_kwargs": {"mood": "!", "facts": [{"a": 1}], "unused": None}},
        {"chat_template_kwargs": {"add_generation_prompt": False}},
    ],
)
@whole_and_streamed
def test_the_prompt_of_a_chat_is_what_its_template_writes(server, fields, stream):
    tokenizer = hub.load_tokenizer(MODEL)
    given = ASKED[CHATS] | {"chat_template": TEMPLATE} | fields
    more = {"add_generation_prompt": not fields.get("continue_final_message")} | given
    kwargs = more.pop("chat_template_kwargs", {})
    wanted = tokenizer.apply_chat_template(more.pop("messages"), tokenize=False, **more | kwargs)
    found = told(server, CHATS, stream, **given, return_token_ids=True)
    assert text(server, found.prompt) == wanted
    assert tokens(server, **given) == found.prompt


@everywhere
@whole_and_streamed
def test_a_request_has_a_name_in_the_headers(server, path, stream):
    assert told(server, path, stream, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    found = told(server, path, stream)
    assert found.headers["x-request-id"] == found.id
    refused = server.http.post(path, json={"max_tokens": 1}, headers={"X-Request-Id": "mine-2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine-2")


@everywhere
@whole_and_streamed
def test_null_stands_for_what_is_left_out(server, path, stream):
    body = Completion if path == COMPLETIONS else Chat
    names = {field.alias or name for name, field in body.model_fields.items()} - {"max_tokens", "seed", "stream"}
    nothing = dict.fromkeys(names - ASKED[path].keys() - {"stream_options"})
    assert told(server, path, stream, **nothing).text == told(server, path, stream).text
