"""Chats of models with a template, without one, and with one from a file."""

from __future__ import annotations

import warnings

import pytest

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.serve.chat import chat_tokens, take_template
from penstock.serve.http.text import Tokens

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def tokenizer():
    return hub.load_tokenizer("python-1m")


def test_a_chat_without_a_template_warns_and_says_how_to_give_one(tokenizer):
    with pytest.warns(UserWarning, match=r"no chat template.*--chat-template FILE"):
        tokens = chat_tokens(tokenizer, HELLO)
    assert tokenizer.decode(tokens) == "user: Hello\nassistant:"
    assert not Tokens(tokenizer).templated


def test_a_template_from_a_file_writes_the_chats(tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_template(tokenizer, tmp_path / "chat.jinja")
        assert tokenizer.decode(chat_tokens(tokenizer, HELLO)) == "<user>Hello<answer>"
    tokens = Tokens(tokenizer)
    assert (tokens.templated, tokens.turn_stops) == (True, ())


@pytest.mark.parametrize(("text", "message"), [("{% for %}", "is no chat template"), (None, "cannot read")])
def test_a_file_that_is_no_template_is_refused(tokenizer, tmp_path, text, message):
    if text is not None:
        (tmp_path / "chat.jinja").write_text(text)
    with pytest.raises(UsageError, match=message):
        take_template(tokenizer, tmp_path / "chat.jinja")
