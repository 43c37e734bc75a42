"""Chats of models with a template, without one, and with one from a file."""

from __future__ import annotations

import pytest

from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.serve.chat import chat_tokens, take_template
from penstock.serve.http.text import Tokens

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def tokenizer():
    return hub.load_tokenizer("python-1m")


def test_a_chat_without_a_template_is_logged_once_with_how_to_give_one(tokenizer, caplog):
    tokenizer.name_or_path = "a model that no other test has"
    for _ in range(2):
        tokens = chat_tokens(tokenizer, HELLO)
    assert tokenizer.decode(tokens) == "user: Hello\nassistant:"
    assert not Tokens(tokenizer).templated
    (record,) = caplog.records
    assert "no chat template" in record.getMessage()
    assert "--chat-template FILE" in record.getMessage()


def test_a_template_from_a_file_writes_the_chats(tokenizer, tmp_path, caplog):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"
    )
    take_template(tokenizer, tmp_path / "chat.jinja")
    assert tokenizer.decode(chat_tokens(tokenizer, HELLO)) == "<user>Hello<answer>"
    assert not caplog.records
    tokens = Tokens(tokenizer)
    assert (tokens.templated, tokens.turn_stops) == (True, ())


@pytest.mark.parametrize(("text", "message"), [("{% for %}", "is no chat template"), (None, "cannot read")])
def test_a_file_that_is_no_template_is_refused(tokenizer, tmp_path, text, message):
    if text is not None:
        (tmp_path / "chat.jinja").write_text(text)
    with pytest.raises(UsageError, match=message):
        take_template(tokenizer, tmp_path / "chat.jinja")


#: As Qwen's: roles that it does not know are left out.
SILENT = (
    "{%- for m in messages %}{%- if m.role in ('system', 'user', 'assistant') %}<{{ m.role }}>{{ m.content }}"
    "{%- elif m.role == 'tool' %}<result>{{ m.content }}{%- endif %}{%- endfor %}<answer>"
)
#: It knows developers, and nothing of systems.
MODERN = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content | trim }}{% endif %}{% endfor %}"
#: As Gemma's.
STRICT = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}{% endfor %}"
BRIEF = {"role": "developer", "content": " Be brief. "}


def written(tokenizer, template: str, *messages: dict) -> str:
    tokenizer.chat_template = template
    return tokenizer.decode(chat_tokens(tokenizer, list(messages)))


def test_a_developer_is_the_system_where_the_template_does_not_know_it(tokenizer):
    assert written(tokenizer, SILENT, BRIEF, *HELLO) == "<system> Be brief. <user>Hello<answer>"
    assert written(tokenizer, MODERN, BRIEF, *HELLO) == "<developer>Be brief.<user>Hello"
    # Also where the same words stand in another message.
    assert written(tokenizer, SILENT, {**BRIEF, "content": "Hello"}, *HELLO) == "<system>Hello<user>Hello<answer>"
    with pytest.raises(UsageError, match="refuses the conversation: only users"):
        written(tokenizer, STRICT, BRIEF, *HELLO)


@pytest.mark.parametrize(
    ("template", "role", "place"), [(SILENT, "function", 2), (MODERN, "system", 2), (SILENT, "king", 2)]
)
def test_a_role_that_the_template_drops_is_an_error_that_names_it(tokenizer, template, role, place):
    with pytest.raises(UsageError, match=f"leaves out message {place}, of the role '{role}'"):
        written(tokenizer, template, *HELLO, {"role": role, "content": "Hello"})


def test_what_says_nothing_may_be_left_out(tokenizer):
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "look"}}]}
    template = (
        "{% for m in messages %}{% if m.tool_calls %}<{{ m.tool_calls[0].function.name }}>{% else %}"
        "<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    )
    assert written(tokenizer, template, *HELLO, call) == "<user>Hello<look>"
    assert written(tokenizer, SILENT, {"role": "function", "content": ""}, *HELLO) == "<user>Hello<answer>"


def test_a_template_that_reads_the_content_is_taken_at_its_word(tokenizer):
    template = "{% for m in messages %}{{ m.content.split('|')[1] + '' }}{% endfor %}"
    assert written(tokenizer, template, {"role": "user", "content": "a|b"}) == "b"


# Functions

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
RESULT = [*CALLED, {"role": "tool", "tool_call_id": "1", "content": "2"}]
#: It knows functions; of arguments it wants the text, as DeepSeek's.
KNOWING = (
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}"
    "{{ m.content or '' }}{% endfor %}"
)
#: As Gemma's: two roles in turns.
TURNS = (
    "{% for m in messages %}{% if m.role != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def test_functions_that_a_template_does_not_know_are_described(tokenizer):
    for template, role in ((SILENT, "system"), (TURNS, "user")):
        tokenizer.chat_template = template
        text = tokenizer.decode(chat_tokens(tokenizer, RESULT, [ADD]))
        assert text.startswith(f"<{role}>You can call functions.")
        assert '{"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}' in text
        assert text.count("<user>") == 2
    # What it wrote itself stays as it was, and what was said by the system is still said.
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n2\n</tool_response>" in text
    tokenizer.chat_template = SILENT
    text = tokenizer.decode(chat_tokens(tokenizer, [{"role": "system", "content": "Be brief."}, *HELLO], [ADD]))
    assert text.startswith("<system>Be brief.\n\nYou can call functions.")


def test_arguments_are_objects_or_text_as_the_template_wants_them(tokenizer):
    tokenizer.chat_template = KNOWING
    assert tokenizer.decode(chat_tokens(tokenizer, CALLED, [ADD])) == '(add)<user>Hello<assistant>add {"a": 1}'
    tokenizer.chat_template = KNOWING.replace("c.function.arguments", "(c.function.arguments | tojson)")
    assert tokenizer.decode(chat_tokens(tokenizer, RESULT, [ADD])) == ('(add)<user>Hello<assistant>add {"a": 1}<tool>2')
