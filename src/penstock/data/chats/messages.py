"""Conversations in the forms in which data sets hold them, read as messages with a ``role`` and a ``content``.

A record is in one of these forms, told by its fields:

- ``messages``: a list of messages, and perhaps ``tools``, the functions that the assistant may call;
- ShareGPT's: ``conversations``, a list of ``from`` (``human``, ``gpt``, ``system``, ``function_call``, whose value is
  JSON with a ``name`` and ``arguments``, and ``observation``, what that returned) and ``value``, and perhaps ``tools``;
- Alpaca's: ``instruction``, perhaps ``input``, and ``output``;
- ``prompt`` and ``completion``, each a text or a list of messages.

``system`` may stand beside each of the last three. A preference is a ``chosen`` and a ``rejected`` answer to a
``prompt``, or two whole conversations that share all but their ends. A rating is a conversation in one of these forms
with a ``label``, which says whether its last answer is good: true or false.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from penstock.core.errors import DataError
from penstock.core.strict_json import parsed

Message = Mapping[str, Any]

#: Roles by the names that data sets give them.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}

#: Which roles a message may follow; None stands for the beginning.
AFTER: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "developer": (None,),
    "user": (None, "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

FORMS = "'messages', 'conversations', 'instruction' and 'output', or 'prompt' and 'completion'"


class Conversation(NamedTuple):
    """Messages in their order, the last of them an answer of the assistant, and the functions that it may call."""

    messages: list[Message]
    tools: list[Any] | None = None


def conversation(record: Any, where: str) -> Conversation:
    """The conversation that a record holds.

    Raises:
        DataError: it holds none, or one whose roles are out of order, whose end is no answer or of whose answers one
            is empty; the message begins with ``where``.
    """
    fields = _fields(record, where)
    if "messages" in fields:
        messages = _messages(fields["messages"], where)
    elif "conversations" in fields:
        messages = [*_system(fields), *_messages(fields["conversations"], where)]
    elif "instruction" in fields and "output" in fields:
        asked = "\n\n".join(str(fields[key]) for key in ("instruction", "input") if fields.get(key))
        messages = [*_system(fields), *_as_messages(asked, "user", where)]
        messages += _as_messages(fields["output"], "assistant", where)
    elif "prompt" in fields and "completion" in fields:
        messages = [*_system(fields), *_as_messages(fields["prompt"], "user", where)]
        messages += _as_messages(fields["completion"], "assistant", where)
    else:
        raise DataError(f"{where} is no conversation: it has the fields {', '.join(fields) or 'none'}, not {FORMS}")
    return _answered(_ordered(Conversation(messages, _tools(fields, where)), where), where)


def preference(record: Any, where: str) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a record, alike but for their last answers, of which the rejected one
    may be empty.

    Raises:
        DataError: as :func:`conversation`, or they do not begin alike, or are the same.
    """
    fields = _fields(record, where)
    if "chosen" not in fields or "rejected" not in fields:
        raise DataError(f"{where} is no preference: it needs 'chosen' and 'rejected', and has {', '.join(fields)}")
    begin = [*_system(fields), *_as_messages(fields["prompt"], "user", where)] if "prompt" in fields else []
    chosen, rejected = (
        _ordered(
            Conversation([*begin, *_as_messages(fields[key], "assistant", where)], _tools(fields, where)),
            f"{where}, {key}",
        )
        for key in ("chosen", "rejected")
    )
    _answered(chosen, f"{where}, chosen")
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise DataError(f"{where}: the chosen and the rejected answer are not answers to the same conversation")
    if chosen.messages == rejected.messages:
        raise DataError(f"{where}: the chosen and the rejected answer are the same")
    return chosen, rejected


def rating(record: Any, where: str) -> tuple[Conversation, bool]:
    """The conversation of a record, and whether its last answer is good.

    Raises:
        DataError: as :func:`conversation`, or it does not say whether the answer is good.
    """
    chat = conversation(record, where)
    label = record.get("label")
    if label not in (True, False):  # 0 and 1 too
        raise DataError(f"{where} is no rating: its 'label' must be true or false, and is {label!r:.40}")
    return chat, bool(label)


def _fields(record: Any, where: str) -> dict[str, Any]:
    """The fields of a record that hold something."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is not a JSON object but a {type(record).__name__}")
    return {key: value for key, value in record.items() if value is not None}


def _system(fields: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": fields["system"]}] if fields.get("system") else []


def _tools(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """The functions of a record in OpenAI's form; data sets have them as JSON too, and without what is around them."""
    tools = _json(fields.get("tools"), f"{where}, tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: tools must be a list of functions")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _calls(value: Any, where: str) -> list[Message]:
    """The calls that are the value of a message from ``function_call``: one, or a list."""
    found = _json(value, where)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"{where} is no call of a function: it must be JSON with a 'name' and 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def _json(value: Any, where: str) -> Any:
    """What a text of JSON stands for; anything else as it is."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return parsed(value)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error


def _as_messages(value: Any, role: str, where: str) -> list[Message]:
    """A text as a message of ``role``; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, where)


def _messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: messages must be a list, and are a {type(value).__name__}")
    return [_message(each, f"{where}, message {number}") for number, each in enumerate(value, 1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object but a {type(value).__name__}")
    # Columns of Parquet are there for each message, empty where it has none.
    message = {key: each for key, each in value.items() if each is not None}
    if "from" in message and "value" in message:
        message = {"role": message["from"], "content": message["value"]}
    if message.get("role") == "function_call":
        message = {"role": "assistant", "tool_calls": _calls(message.get("content"), where)}
    role = ROLES.get(str(message.get("role")))
    if role is None:
        raise DataError(f"{where} has the role {message.get('role')!r}, not one of {', '.join(sorted({*AFTER}))}")
    content = message.get("content")
    if not (isinstance(content, (str, list)) or (content is None and message.get("tool_calls"))):
        said = "no content" if content is None else f"the content {content!r:.40}, which is no text and no list"
        raise DataError(f"{where} has {said}")
    return {"content": "", **message, "role": role}


def _ordered(found: Conversation, where: str) -> Conversation:
    """The conversation itself, where its roles are in order and it ends with an answer."""
    before: str | None = None
    for number, message in enumerate(found.messages, 1):
        role = message["role"]
        if before not in AFTER[role]:
            place = f"after one of the {before}" if before else "at the beginning"
            raise DataError(f"{where}: the roles are out of order: message {number}, of the {role}, stands {place}")
        before = role
    if not any(message["role"] == "assistant" for message in found.messages):
        raise DataError(f"{where} is a conversation without an answer: it has no message of the assistant")
    if before != "assistant":
        raise DataError(f"{where} does not end with an answer: its last message is of the {before}")
    return found


def _answered(found: Conversation, where: str) -> Conversation:
    """The conversation itself, where all of its answers say something: of an empty one nothing but to end is learnt."""
    for number, message in enumerate(found.messages, 1):
        says = message.get("tool_calls") or message.get("reasoning_content") or _text(message.get("content"))
        if message["role"] == "assistant" and not says:
            raise DataError(f"{where}, message {number}, of the assistant, is an empty answer")
    return found


def _text(content: Any) -> str:
    """What a content says, of parts that of those which are text."""
    if isinstance(content, str):
        return content.strip()
    texts = [each.get("text", "") if isinstance(each, Mapping) else each for each in content]
    return "".join(text for text in texts if isinstance(text, str)).strip()
