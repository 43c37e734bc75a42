"""Conversations as the text that a model continues."""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.core.files import read_text
from penstock.core.strict_json import as_json
from penstock.models.chats import ChatWriter, Message, Messages, called, of_tools
from penstock.serve.dialogue.answer import Answer, Call
from penstock.serve.dialogue.contract import Dialogue
from penstock.serve.dialogue.guess import guess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

#: For models that bring no template: each message under its role, and a line for the answer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

#: Stands in a conversation where contexts do; nobody else can have written it.
CONTEXTS_HERE = f"contexts{secrets.token_hex(8)}here"

#: What a user of a model without a template is told.
NO_TEMPLATE = (
    "the model has no chat template, so chats are written as a plain transcript, which it may not have been trained "
    "on; give one with --chat-template FILE, or put chat_template.jinja into the model's folder"
)


def take_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Makes the Jinja template in ``path`` that of the tokenizer.

    Raises:
        UsageError: it cannot be read, or not be filled with the simplest conversation.
    """
    tokenizer.chat_template = read_text(path)
    try:
        chat_tokens(tokenizer, [{"role": "user", "content": "Hello"}])
    except UsageError as error:
        raise UsageError(f"{path} is no chat template: {error.what}") from error


@functools.cache
def _tell_of_no_template(model: str) -> None:
    """Warns once for each model."""
    log.warning("%s", NO_TEMPLATE)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation up to where the assistant's next message begins, as text and as tokens. Where contexts may stand
    in it, they stand behind the first ``shared`` tokens."""

    text: str
    tokens: list[int]
    shared: int = 0


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    dialogue: Dialogue | None = None,
    special: bool = False,
    template: str | None = None,
) -> Prompt:
    """A conversation up to where the assistant's next message begins, by the model's own template or, where it has
    none, by :data:`DEFAULT_TEMPLATE`, with a warning in the log.

    Messages of the role ``developer`` are written as those of the ``system`` where the template does not know it. Where
    it does not know of functions, they are described in the first message, and calls and results are written as text.

    Args:
        messages: each with a ``role`` and a ``content``, as OpenAI's clients write them.
        tools: functions that the assistant may call, as the template wants them.
        variables: more that the template may ask for, such as Qwen3's ``enable_thinking``; and the arguments
            ``add_generation_prompt`` and ``continue_final_message`` of ``transformers``' ``apply_chat_template``.
        dialogue: how the model writes calls; guessed from the template if not given.
        special: add the tokens that the model wants around a text; most templates write them.
        template: in place of the model's own, in Jinja's language.

    Raises:
        UsageError: there is no message, or the template refuses the conversation, or leaves out one of its messages.
    """
    if not messages:
        raise UsageError("a conversation needs at least one message")
    template = template or tokenizer.chat_template
    if not template:
        _tell_of_no_template(str(tokenizer.name_or_path))
    write = ChatWriter(tokenizer, tools, variables or {}, template or DEFAULT_TEMPLATE)
    if any(message.get("role") == "developer" for message in messages) and not write.keeps(messages, "developer"):
        messages = [{**each, "role": "system"} if each.get("role") == "developer" else each for each in messages]
    if (tools or any(map(of_tools, messages))) and not write.knows_tools(messages):
        messages = _in_words(messages, tools or [], dialogue or guess(str(template or "")))
        write = ChatWriter(tokenizer, None, variables or {}, template or DEFAULT_TEMPLATE)
        if tools and not write.keeps(messages, "system"):
            messages = _without_system(messages)
    text = write(messages)
    dropped = write.dropped(messages)
    if dropped:
        place, role = dropped[0] + 1, messages[dropped[0]].get("role")
        raise UsageError(
            f"the model's chat template leaves out message {place}, of the role {role!r}: "
            "the model would not read it; give its content in a message of another role"
        )
    before, mark, behind = text.partition(CONTEXTS_HERE)
    tokens: list[int] = tokenizer(before, add_special_tokens=special)["input_ids"]
    if not mark:
        return Prompt(text, tokens)
    rest: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return Prompt(before + behind, [*tokens, *rest], len(tokens))


def with_place(messages: Messages) -> list[Message]:
    """The conversation, with contexts standing before the text of the user's first message, so that they stay where
    they are as it goes on: :func:`chat_prompt` says where that is.

    Raises:
        UsageError: there is no such message.
    """
    place = next((place for place, message in enumerate(messages) if message.get("role") == "user"), None)
    if place is None or not isinstance(messages[place].get("content"), str):
        raise UsageError("contexts stand before the text of the user's first message, and there is none")
    marked = {**messages[place], "content": f"{CONTEXTS_HERE}{messages[place]['content']}"}
    return [*messages[:place], marked, *messages[place + 1 :]]


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of :func:`chat_prompt`."""
    return chat_prompt(tokenizer, messages, tools, variables).tokens


# Functions in words, for templates that know none


def _in_words(messages: Messages, tools: Sequence[Mapping[str, Any]], dialogue: Dialogue) -> list[Message]:
    """The conversation with functions, calls and what they returned in ordinary messages."""
    written: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = tuple(Call(name, arguments) for name, arguments in map(called, message["tool_calls"]))
            text = dialogue.write(Answer(str(message.get("content") or ""), calls))
            written.append({"role": message.get("role"), "content": text})
        elif message.get("role") == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if written and written[-1].get("role") == "user":  # roles may have to alternate
                text = f"{written.pop()['content']}\n{text}"
            written.append({"role": "user", "content": text})
        else:
            written.append(message)
    if not tools:
        return written
    told = _described(tools, dialogue)
    if written[0].get("role") in ("system", "developer") and isinstance(written[0].get("content"), str):
        return [{**written[0], "content": f"{written[0]['content']}\n\n{told}"}, *written[1:]]
    return [{"role": "system", "content": told}, *written]


def _described(tools: Sequence[Mapping[str, Any]], dialogue: Dialogue) -> str:
    functions = "\n".join(as_json(tool.get("function", tool)) for tool in tools)
    form = dialogue.write(Answer(calls=(Call("NAME", '{"PARAMETER": "VALUE"}'),)))
    return (
        f"You can call functions. Each of these lines describes one in JSON:\n{functions}\n\n"
        f"To call a function, answer in this form:\n{form}"
    )


def _without_system(messages: list[Message]) -> list[Message]:
    """The same with the first message, of the system, before the text of the user's first."""
    first, *others = messages
    place = next((place for place, each in enumerate(others) if each.get("role") == "user"), None)
    if place is None:
        return messages
    others[place] = {**others[place], "content": f"{first['content']}\n\n{others[place].get('content') or ''}"}
    return others
