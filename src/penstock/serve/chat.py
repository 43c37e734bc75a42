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

    Args:
        messages: each with a ``role`` and a ``content``, as OpenAI's clients write them.
        tools: functions that the assistant may call, as the template wants them.
        variables: more that the template may ask for, such as Qwen3's ``enable_thinking``.

    Raises:
        UsageError: there is no message, or the template refuses the conversation.
    """
    if not messages:
        raise UsageError("a conversation needs at least one message")
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    if template is not None:
        warnings.warn(NO_TEMPLATE, stacklevel=2)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            **(variables or {}),
        )
    except Exception as error:  # A template is a program of the model's makers, and raises what it likes.
        raise UsageError(f"the model's chat template refuses the conversation: {error}") from error
    # The template wrote the special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens
