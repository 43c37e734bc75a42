"""Conversations as the text that a model continues."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.core.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: For models that bring no template: each message under its role, and a line for the answer.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

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


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next message begins, by the model's own template or,
    where it has none, by :data:`DEFAULT_TEMPLATE`, with a warning.

    Messages of the role ``developer`` are written as those of the ``system`` where the template does not know it.

    Args:
        messages: each with a ``role`` and a ``content``, as OpenAI's clients write them.
        tools: functions that the assistant may call, as the template wants them.
        variables: more that the template may ask for, such as Qwen3's ``enable_thinking``.

    Raises:
        UsageError: there is no message, or the template refuses the conversation, or leaves out one of its messages.
    """
    if not messages:
        raise UsageError("a conversation needs at least one message")
    if not tokenizer.chat_template:
        warnings.warn(NO_TEMPLATE, stacklevel=2)
    write = _Writer(tokenizer, tools, variables or {})
    if any(message.get("role") == "developer" for message in messages) and not write.keeps(messages, "developer"):
        messages = [{**each, "role": "system"} if each.get("role") == "developer" else each for each in messages]
    text = write(messages)
    dropped = write.dropped(messages)
    if dropped:
        place, role = dropped[0] + 1, messages[dropped[0]].get("role")
        raise UsageError(
            f"the model's chat template leaves out message {place}, of the role {role!r}: "
            "the model would not read it; give its content in a message of another role"
        )
    # The template wrote the special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


class _Writer:
    """Writes conversations with a model's template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> None:
        self._tokenizer, self._tools, self._variables = tokenizer, tools, variables

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation.

        Raises:
            UsageError: the template refuses it.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if self._tools is None else [dict(tool) for tool in self._tools],
                chat_template=None if self._tokenizer.chat_template else DEFAULT_TEMPLATE,
                add_generation_prompt=True,
                tokenize=False,
                **self._variables,
            )
        except Exception as error:  # A template is a program of the model's makers, and raises what it likes.
            raise UsageError(f"the model's chat template refuses the conversation: {error}") from error
        return text

    def dropped(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
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

    def keeps(self, messages: Sequence[Mapping[str, Any]], role: str) -> bool:
        """Whether the template takes the messages, and writes all those of ``role``."""
        try:
            self(messages)
        except UsageError:
            return False
        return not any(messages[place].get("role") == role for place in self.dropped(messages))
