"""What a refused request is told: the field at fault, and in words what is wanted in its place."""

from __future__ import annotations

import json

import httpx
import pytest

from in_process import asked

JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "x"}


def error(path: str, content: bytes, headers: dict[str, str] = JSON) -> dict[str, str]:
    answer: httpx.Response = asked(path, content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b'{"prompt": "x"}', {}, "send the header Content-Type: application/json"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, "send the header Content-Type: application/json"),
        (b"", JSON, "there is no body: send a JSON object"),
        (b"[1]", JSON, "the body must be a JSON object, not an array"),
        (b'"x"', JSON, "the body must be a JSON object, not a string"),
        (b"true", JSON, "the body must be a JSON object, not true or false"),
        (b"[" * 100_000, JSON, "the body has too many arrays or objects within each other"),
        (b'{"prompt": "\xff"}', JSON, "the body is not UTF-8"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", JSON, "the body cannot be read: Exceeds the limit"),
    ],
)
def test_a_body_that_is_no_object_is_told_what_to_send(content, headers, message):
    assert message in error("/v1/completions", content, headers)["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": [-1]}, "prompt", "prompt.0: Input should be greater than or equal to 0"),
        ({"prompt": [5, -1]}, "prompt", "prompt.1: Input should be greater than or equal to 0"),
        ({"prompt": [[5], [-1]]}, "prompt", "prompt.1.0: Input should be greater than or equal to 0"),
        ({"prompt": [{}]}, "prompt", "prompt.0: Input should be a valid string or a valid integer or a valid list"),
        ({"prompt": [4096]}, "prompt", "token 4096 is outside of the vocabulary of 4096"),
        ({"prompt": [1] * 2048}, "prompt", "the prompt has 2048 tokens"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "token 4096 is outside of the vocabulary"),
        ({"stop_token_ids": [4096]}, "stop_token_ids", "token 4096 is outside of the vocabulary"),
        ({"logit_bias": {"x": 5}}, "logit_bias", "'x' is no token: its number is wanted, in digits"),
        ({"stop": ["a"] * 17}, "stop", "stop: List should have at most 16 items after validation, not 17"),
    ],
)
def test_a_field_is_named_with_what_it_should_be(body, param, message):
    told = error("/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1} | body).encode())
    assert message in told["message"]
    assert told["param"] == param


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json_schema"}, "the type 'json_schema' needs the field json_schema beside it"),
        ({"type": "regex", "ebnf": "start: "}, "the type 'regex' does not go with the field ebnf"),
        ({"type": "text", "regex": "x"}, "the type 'text' does not go with the field regex"),
    ],
)
def test_a_form_is_told_which_field_it_needs(form, message):
    body = {"messages": [USER], "response_format": form}
    assert message in error("/v1/chat/completions", json.dumps(body).encode())["message"]


@pytest.mark.parametrize("role", ["user", "system", "developer", "assistant", "tool"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_message_says_something(role, content):
    body = {"messages": [{"role": role, **content}]}
    told = error("/v1/chat/completions", json.dumps(body).encode())
    assert told["message"] == f"messages.0: a message of the role {role!r} needs a content"
    assert told["param"] == "messages"


@pytest.mark.parametrize("instead", ["tool_calls", "reasoning_content"])
def test_an_assistant_may_call_or_think_instead(instead):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"tool_calls": [call], "reasoning_content": "hm"}[instead]
    body = {"messages": [USER, {"role": "assistant", "content": None, instead: said}, USER]}
    assert asked("/v1/chat/completions", json=body).status_code == 200
