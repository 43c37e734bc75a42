"""Conversations as tokens, and which of them are learnt, beside what transformers and the server make of them."""

from __future__ import annotations

import json

import pytest

from penstock.core.errors import DataError
from penstock.data.chats.messages import Conversation, conversation
from penstock.data.chats.template import Template
from penstock.serve.chat import chat_tokens
from tiny_chats import MARKED, TEMPLATE, make_chat_model, turns

CHAT = Conversation(turns("what is 1?", "a word\n", "and 2 \n", " 22 ü", system="be kind"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


def with_template(model, tmp_path, text: str) -> Template:
    (tmp_path / "template.jinja").write_text(text)
    return Template(model, tmp_path / "template.jinja")


def learnt_text(template: Template, chat: Conversation, learnt="answers") -> list[str]:
    """The runs of tokens that are learnt, as text."""
    written, found = template.write(chat, "here", learnt), []
    for token, chosen, before in zip(written.tokens, written.learnt, [False, *written.learnt], strict=False):
        if chosen and not before:
            found.append([])
        if chosen:
            found[-1].append(token)
    return [template.tokenizer.decode(run) for run in found]


def test_answers_are_learnt_with_the_token_that_ends_them(model):
    assert learnt_text(Template(model), CHAT) == ["a word\n<|im_end|>", " 22 ü<|im_end|>"]
    assert learnt_text(Template(model), CHAT, "last") == [" 22 ü<|im_end|>"]
    written = Template(model).write(CHAT, "here", "all")
    assert written.learnt.all()


def test_turns_and_marks_and_transformers_agree(model, tmp_path):
    """By turns, without marks, is what transformers' mask says of the same template with marks."""
    marked = with_template(model, tmp_path, MARKED)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = marked.tokenizer.apply_chat_template(CHAT.messages, **options)
    for template in (Template(model), marked):
        ours = template.write(CHAT, "here")
        assert ours.tokens.tolist() == theirs["input_ids"]
        assert ours.learnt.tolist() == [bool(each) for each in theirs["assistant_masks"]]
    assert learnt_text(marked, CHAT, "last") == [" 22 ü<|im_end|>"]


def test_what_comes_before_an_answer_is_what_the_server_prompts_with(model):
    template = Template(model)
    written = template.write(CHAT, "here")
    for place in (2, 4):
        prompt = chat_tokens(template.tokenizer, CHAT.messages[:place])
        assert written.tokens[: len(prompt)].tolist() == prompt
        assert written.learnt[len(prompt)]
        assert not written.learnt[len(prompt) - 1]


#: As Qwen's: functions are listed first, and calls are JSON.
TOOLS = (
    "{% if tools %}{{ tools | map('tojson') | join('\n') }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}"
    '{% for call in m.tool_calls or [] %}{"name": "{{ call.function.name }}", "arguments": ARGUMENTS}{% endfor %}'
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("written", ["{{ call.function.arguments | tojson }}", "{{ call.function.arguments + '' }}"])
@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_calls_of_functions_are_learnt_as_the_server_writes_them(model, tmp_path, arguments, written, marked):
    """Data sets have arguments as objects or as JSON, and templates want them as one or the other."""
    text = TOOLS.replace("ARGUMENTS", written)
    if not marked:
        text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = with_template(model, tmp_path, text)
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}],
    }
    messages = [*turns("add"), call, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "it is 2"}]
    chat = conversation({"messages": messages, "tools": [ADD]}, "here")
    assert learnt_text(template, chat) == ['{"name": "add", "arguments": {"a": 1}}<|im_end|>', "it is 2<|im_end|>"]
    tokens = template.write(chat, "here").tokens.tolist()
    for place in (1, 3):
        prompt = chat_tokens(template.tokenizer, messages[:place], [ADD])
        assert tokens[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        (turns("add", "2"), [ADD]),
        ([*turns("add"), {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}], None),
    ],
)
def test_functions_and_calls_that_the_template_leaves_out_are_told(model, messages, tools):
    """Else the model would learn to say nothing in place of a call."""
    with pytest.raises(DataError, match="line 7: the chat template does not write functions") as caught:
        Template(model).write(conversation({"messages": messages, "tools": tools}, "here"), "chats.jsonl, line 7")
    assert "data.chat_template=FILE" in caught.value.hint


def test_an_answer_that_the_template_does_not_end_gets_the_end_of_text(model, tmp_path):
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    template = with_template(model, tmp_path, bare + prompt)
    assert learnt_text(template, Conversation(turns("hello", "hi"))) == ["hi\n<|endoftext|>"]
    assert template.ends == {0}
    ended = Template(model)
    ended.write(CHAT, "here")
    assert ended.ends == {ended.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_prompts_that_end_with_more_than_the_answers_begin_with(model, tmp_path):
    """Models that think are prompted with <think>, which a template leaves out before answers that have none."""
    thinking = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert learnt_text(with_template(model, tmp_path, thinking), CHAT) == ["a word\n<|im_end|>", " 22 ü<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "learnt", "why"),
    [
        ("{{ raise_exception('no system here') }}", "answers", "the chat template fails: no system here"),
        ("{{ messages[9].content.nothing }}", "answers", "the chat template fails"),
        (
            "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}{% endfor %}",
            "answers",
            "writes message 3 in another way when more messages follow",
        ),
        ("{{ messages[-1].content }}", "last", "does not write message 5 after those before it"),
        (
            f"{{% if messages[0].role == 'system' %}}{{% set messages = messages[1:] %}}{{% endif %}}{TEMPLATE}",
            "answers",
            "leaves out message 1, of the system",
        ),
        (MARKED.replace("'assistant'", "'nobody'"), "answers", "tokens are masked: there is nothing in it to learn"),
    ],
)
def test_templates_that_do_not_do_are_refused_with_the_place_and_the_reason(model, tmp_path, template, learnt, why):
    with pytest.raises(DataError, match=why) as caught:
        with_template(model, tmp_path, template).write(CHAT, "chats.jsonl, line 7", learnt)
    assert caught.value.what.startswith("chats.jsonl, line 7")


def test_texts_that_are_no_unicode_are_refused_with_the_place(model):
    with pytest.raises(DataError, match=r"chats\.jsonl, line 7 is not valid Unicode: it has half of a surrogate pair"):
        Template(model).write(Conversation(turns("what", "a \ud800")), "chats.jsonl, line 7")


def test_a_model_without_a_template_is_told_how_to_get_one(tmp_path):
    model = make_chat_model(tmp_path / "model", template=None)
    assert "chat_template" not in json.loads((model / "tokenizer_config.json").read_text())
    with pytest.raises(DataError, match="has no chat template") as caught:
        Template(model)
    assert "data.chat_template=FILE" in caught.value.hint
