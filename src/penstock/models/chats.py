"""Conversations as text, written with a model's own template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.core.strict_json import as_json, parsed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Messages = Sequence[Message]


def of_tools(message: Message) -> bool:
    """Whether a message has calls, or what one returned."""
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def called(call: Mapping[str, Any]) -> tuple[str, str]:
    """Name and arguments, as JSON, of a call in a message."""
    told = call.get("function")
    told = told if isinstance(told, Mapping) else {}
    arguments = told.get("arguments", "{}")
    return str(told.get("name", "")), arguments if isinstance(arguments, str) else as_json(arguments)


def _with_calls(message: Message, name: str | None, as_objects: bool) -> Message:
    """``message`` with the arguments of its calls as objects or as JSON, and another ``name`` for all functions."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        own, arguments = called(call)
        try:
            made = parsed(arguments or "{}") if as_objects else arguments
        except ValueError:
            made = arguments
        calls.append({**call, "function": {**call.get("function", {}), "name": name or own, "arguments": made}})
    return {**message, "tool_calls": calls}


def forms(messages: Messages) -> Iterator[Messages]:
    """The conversation in the ways in which templates want it, the usual one first: most write the arguments of calls
    as JSON, and some want them written."""
    yield [_with_calls(message, None, True) for message in messages]
    if any(message.get("tool_calls") for message in messages):
        yield [_with_calls(message, None, False) for message in messages]


class ChatWriter:
    """Writes conversations with a model's template, for the server and for training alike.

    Args:
        tokenizer: the model's.
        tools: functions that the assistant may call, as the template wants them.
        variables: more that the template may ask for, and arguments of ``apply_chat_template``; a prompt for an answer
            is added unless ``add_generation_prompt`` says otherwise.
        template: in place of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        template: str | None = None,
    ) -> None:
        self._tokenizer, self._tools, self._variables, self._template = tokenizer, tools, variables, template

    def __call__(self, messages: Messages) -> str:
        """The text of a conversation.

        Raises:
            UsageError: the template refuses it.
        """
        usual, *others = forms(messages)
        try:
            return self._written(usual)
        except UsageError:
            if not others:
                raise
        return self._written(others[0])

    def _written(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        tools = self._tools if tools is None else tools
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [json.loads(json.dumps(tool)) for tool in tools],
                chat_template=self._template,
                tokenize=False,
                **{"add_generation_prompt": True, **self._variables},
            )
        except Exception as error:  # A template is a program of the model's makers, and raises what it likes.
            raise UsageError(f"the model's chat template refuses the conversation: {error}") from error
        return text

    def dropped(self, messages: Messages) -> list[int]:
        """The messages whose content does not come into the text: it is looked for, with a word of its own in its
        place. One with calls may stand for them alone."""
        words = [f"message{place}of{len(messages)}content" for place in range(len(messages))]
        asked = [
            place
            for place, each in enumerate(messages)
            if isinstance(each.get("content"), str) and each["content"].strip() and not each.get("tool_calls")
        ]
        marked = [{**each, "content": words[place]} if place in asked else each for place, each in enumerate(messages)]
        try:
            text = self(marked)
        except UsageError:  # a template that reads the content cannot be asked so
            return []
        return [place for place in asked if words[place] not in text]

    def keeps(self, messages: Messages, role: str) -> bool:
        """Whether the template takes the messages, and writes all those of ``role``."""
        try:
            self(messages)
        except UsageError:
            return False
        return not any(messages[place].get("role") == role for place in self.dropped(messages))

    def knows_tools(self, messages: Messages) -> bool:
        """Whether the template writes the functions and the calls: their names are looked for, each with a word of its
        own in its place."""
        words = [f"tool{place}of{len(self._tools or ())}name" for place in range(len(self._tools or ()))]
        marked = [
            {**tool, "function": {**tool["function"], "name": word}} if "function" in tool else {**tool, "name": word}
            for tool, word in zip(self._tools or (), words, strict=True)
        ]
        asked, renamed = list(words), []
        for place, message in enumerate(messages):
            word = f"call{place}of{len(messages)}name"
            asked += [word] if message.get("tool_calls") else []
            renamed.append(_with_calls(message, word, True))
        for as_objects in (True, False):
            try:
                text = self._written([_with_calls(each, None, as_objects) for each in renamed], marked)
            except UsageError:
                continue
            results = [place for place in self.dropped(messages) if messages[place].get("role") == "tool"]
            return all(word in text for word in asked) and not results
        return False
