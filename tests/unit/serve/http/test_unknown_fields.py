"""Fields that are not known: named where they are ignored, refused by a strict server."""

from __future__ import annotations

import httpx
import pytest

from in_process import asked


def post(path: str, body: dict, strict: bool = False) -> httpx.Response:
    return asked(path, strict=strict, json=body)


PART = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
BODIES = [
    ("/v1/completions", {"prompt": "x", "max_tokns": 3}, "max_tokns", "did you mean 'max_tokens'"),
    ("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"chunk": 1}}, "stream_options.chunk", ""),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [PART]}]}, "messages.0.content.0.cache_con", ""),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "é\n": 1}, r"'\xe9\n'", ""),
    ("/v1/completions", {"prompt": "x", "": 1, " b ": 2, "\x00": 3}, r"'', ' b ', \x00", ""),
    ("/tokenize", {"prompt": "x", "bos": 1}, "bos", ""),
]


@pytest.mark.parametrize(("path", "body", "name", "near"), BODIES, ids=[name for _, _, name, _ in BODIES])
def test_a_field_that_is_not_known_is_named_and_ignored(path, body, name, near, caplog):
    answer = post(path, body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["penstock-ignored"].startswith(name)
    assert name in caplog.text
    refused = post(path, body, strict=True)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["message"].startswith("unknown field ")
    assert near in error["message"]


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_known_is_not_named(strict):
    message = {"role": "user", "content": "x", "for_the_template": 1}
    answer = post("/v1/chat/completions", {"messages": [message], "user": "me"}, strict)
    assert answer.status_code == 200
    assert "penstock-ignored" not in answer.headers
