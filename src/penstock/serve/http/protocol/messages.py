"""Anthropic's messages: what is asked for, and how it is said as a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from penstock.core.config import build
from penstock.core.errors import UsageError
from penstock.serve.choose.sampling import MOST_STOPS
from penstock.serve.http.protocol.body import LARGEST, Body, Count
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.generate import Generate


class AnthropicMessage(Body):
    """A message: a text, or blocks."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicTool(Body):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None

    def for_chat(self) -> dict[str, Any]:
        """The same as a chat says it."""
        function = {"name": self.name, "description": self.description or "", "parameters": self.input_schema}
        return {"type": "function", "function": function}


class AnthropicChoice(Body):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> Any:
        """The same as a chat says it."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name or ""}}
        return self.type


class AnthropicThinking(Body):
    """``thinking``."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    display: str | None = None


class SchemaFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputOptions(Body):
    """``output_config``."""

    effort: str | None = None
    format: SchemaFormat | None = None


class Conversation(Body):
    """What is counted, and answered."""

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: OutputOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Taken, and without meaning here
    cache_control: dict[str, Any] | None = None

    def chat(self) -> Chat:
        """The same as a chat.

        Raises:
            UsageError: it cannot be said so.
        """
        thinking, choice, output = self.thinking, self.tool_choice, self.output_config
        variables: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking.type != "disabled"}
        schema = output.format.schema_ if output is not None and output.format is not None else None
        given = {
            "messages": list(self._messages()),
            "tools": None if self.tools is None else [tool.for_chat() for tool in self.tools],
            "tool_choice": choice and choice.for_chat(),
            "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
            "chat_template_kwargs": {**variables, **(self.chat_template_kwargs or {})} or None,
            "thinking_token_budget": thinking and thinking.budget_tokens,
            "reasoning_effort": output and output.effort,
            "response_format": schema and {"type": "json_schema", "json_schema": {"schema": schema}},
            # What the assistant has begun, it goes on with.
            "continue_final_message": self.messages[-1].role == "assistant" or None,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        return build(Chat, self.common() | chosen, "the request")

    def common(self) -> dict[str, Any]:
        """Further fields that a chat has too."""
        return {}

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system:
            yield {"role": "system", "content": _joined(self.system, "system")}
        for place, message in enumerate(self.messages):
            if isinstance(message.content, str):
                yield {"role": message.role, "content": message.content}
            elif message.role == "assistant":
                yield _answer(message.content, f"messages.{place}")
            else:
                yield from _question(message, f"messages.{place}")


class CreateMessage(Generate, Conversation):
    """``POST /v1/messages``."""

    max_tokens: Count
    n: Literal[1] = 1
    stop_sequences: Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    metadata: dict[str, Any] | None = None
    inference_geo: str | None = None

    def common(self) -> dict[str, Any]:
        own = ("metadata", "stop")
        names = [name for name in Generate.model_fields if name in self.model_fields_set and name not in own]
        stops = [*self.stops(), *(self.stop_sequences or ())]
        return {name: getattr(self, name) for name in names} | ({"stop": stops} if stops else {})


def _question(message: AnthropicMessage, place: str) -> Iterator[dict[str, Any]]:
    """What a message of the user's stands for: what calls returned, and then the text."""
    texts = []
    for number, block in enumerate(message.content):
        assert isinstance(block, dict)
        if block.get("type") == "tool_result":
            content = block.get("content")
            text = "" if content is None else _joined(content, f"{place}.content.{number}.content")
            yield {"role": "tool", "tool_call_id": str(block.get("tool_use_id") or ""), "content": text}
        else:
            texts.append(block)
    if texts:
        yield {"role": message.role, "content": _joined(texts, f"{place}.content")}


def _answer(blocks: list[dict[str, Any]], place: str) -> dict[str, Any]:
    """What a message of the assistant's stands for."""
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        kind = block.get("type")
        if kind == "tool_use":
            arguments, name = block.get("input", {}), block.get("name")
            if not isinstance(arguments, dict) or not isinstance(name, str):
                raise UsageError(f"{place}.content.{number}: a tool_use needs a name, and an object as its input")
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            calls.append({"id": str(block.get("id") or ""), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":  # which nobody but Anthropic can read
            texts.append(block)
    message: dict[str, Any] = {"role": "assistant", "content": _joined(texts, f"{place}.content") if texts else None}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _joined(content: Any, place: str) -> str:
    """The text of a content."""
    if isinstance(content, str):
        return content
    texts = []
    for number, block in enumerate(content if isinstance(content, list) else [content]):
        text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(text, str):
            kind = str(block.get("type"))[:50] if isinstance(block, dict) else "none"
            raise UsageError(f"{place}.{number}: blocks of the type {kind!r} are not supported here: a message is text")
        texts.append(text)
    return "".join(texts)
