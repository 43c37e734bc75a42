"""The forms of conversations, and what is refused."""

from __future__ import annotations

import pytest

from penstock.core.errors import DataError
from penstock.data.chats.messages import conversation, preference
from tiny_chats import turns

ASKED = turns("hello", "hi there")
CALLED = '{"name": "add", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": [{**each, "name": None, "tool_calls": None} for each in ASKED]}, ASKED),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi there"}]}, ASKED),
        ({"conversations": ASKED, "system": "be kind"}, turns("hello", "hi there", system="be kind")),
        ({"instruction": "hello", "input": "", "output": "hi there"}, ASKED),
        ({"instruction": "add", "input": "1 2", "output": "3"}, turns("add\n\n1 2", "3")),
        ({"prompt": "hello", "completion": "hi there"}, ASKED),
        ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    ],
)
def test_each_form_is_read_as_the_same_messages(record, messages):
    assert conversation(record, "here").messages == messages


def test_calls_of_tools_are_kept():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    messages = [ASKED[0], call, {"role": "tool", "content": "3"}, ASKED[1]]
    found = conversation({"messages": messages, "tools": [{"name": "add"}]}, "here")
    assert found.tools == [{"type": "function", "function": {"name": "add"}}]
    assert found.messages[1] == {"content": "", **call}


@pytest.mark.parametrize("tools", ['[{"name": "add"}]', [{"name": "add"}], [{"function": {"name": "add"}}]])
def test_calls_in_the_form_of_sharegpt(tools):
    said = [("human", "hello"), ("function_call", CALLED), ("observation", "3"), ("gpt", "hi there")]
    record = {"conversations": [{"from": role, "value": value} for role, value in said], "tools": tools}
    found = conversation(record, "here")
    assert found.tools is not None and found.tools[0]["function"] == {"name": "add"}
    function = {"name": "add", "arguments": {"a": 1}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    assert found.messages == [ASKED[0], call, {"role": "tool", "content": "3"}, ASKED[1]]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": turns("hello")}, "without an answer"),
        ({"messages": []}, "without an answer"),
        ({"messages": turns("hello", "")}, "message 2, of the assistant, is an empty answer"),
        ({"messages": turns("hello", " ", "and", "yes")}, "message 2, of the assistant, is an empty answer"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}, "an empty answer"),
        ({"prompt": "hello", "completion": "\n"}, "message 2, of the assistant, is an empty answer"),
        ({"messages": turns("hello", "hi", "and")}, "does not end with an answer: its last message is of the user"),
        ({"messages": [ASKED[0], ASKED[0], ASKED[1]]}, "message 2, of the user, stands after one of the user"),
        ({"messages": [*ASKED, {"role": "system", "content": "x"}]}, "message 3, of the system, stands after"),
        ({"messages": ASKED[1:]}, "message 1, of the assistant, stands at the beginning"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 1 has the role 'narrator', not one of"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has the content 3, which is no text and no list"),
        ({"messages": ["hello"]}, "message 1 is not an object but a str"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"text": "hello"}, "has the fields text, not 'messages'"),
        (["hello"], "is not a JSON object but a list"),
        ({"messages": ASKED, "tools": "add"}, "tools is no JSON"),
        ({"messages": ASKED, "tools": {"name": "add"}}, "tools must be a list of functions"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "message 1 is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "message 1 is no call of a function"),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_place_and_the_reason(record, why):
    with pytest.raises(DataError, match=why) as caught:
        conversation(record, "chats.jsonl, line 7")
    assert caught.value.what.startswith("chats.jsonl, line 7")


def test_preferences_are_two_answers_to_one_question():
    good, bad = turns("hello", "hi"), turns("hello", "no")
    for record in ({"prompt": "hello", "chosen": "hi", "rejected": "no"}, {"chosen": good, "rejected": bad}):
        chosen, rejected = preference(record, "here")
        assert (chosen.messages, rejected.messages) == (good, bad)
    assert preference({"prompt": "hello", "chosen": "hi", "rejected": ""}, "here")[1].messages == turns("hello", "")
    for record, why in (
        ({"chosen": good, "rejected": turns("another", "no")}, "not answers to the same conversation"),
        ({"prompt": "hello", "chosen": "hi", "rejected": "hi"}, "are the same"),
        ({"prompt": "hello", "chosen": "hi"}, "needs 'chosen' and 'rejected'"),
        ({"prompt": "hello", "chosen": "", "rejected": "no"}, "here, chosen, message 2, of the assistant, is an empty"),
        ({"chosen": turns("hello"), "rejected": bad}, "here, chosen is a conversation without an answer"),
    ):
        with pytest.raises(DataError, match=why):
            preference(record, "here")
