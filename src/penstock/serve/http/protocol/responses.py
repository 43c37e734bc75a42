"""OpenAI's responses: what is asked for, and how it is said as a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from penstock.core.config import build
from penstock.core.errors import UsageError
from penstock.serve.choose.sampling import MOST_LOGPROBS
from penstock.serve.http.protocol.body import LARGEST, Body, Count
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.protocol.generate import Generate

#: Fields of responses that need what this server does not have, and why.
ELSEWHERE = {
    "background": "responses are made while the client waits",
    "conversation": "a conversation goes on by previous_response_id, or its messages are sent along",
    "prompt": "this server keeps no templates of prompts",
}

#: What ``include`` may name for log-probabilities.
LOGPROBS = "message.output_text.logprobs"


class Effort(Body):
    """``reasoning``."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Format(Body):
    """What the text must be; as :class:`~penstock.serve.http.protocol.guided.ResponseFormat`, but flat."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        """The same as a chat says it."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name or "", "schema": self.schema_ or {}, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


class TextOptions(Body):
    """``text``."""

    format: Format | None = None
    verbosity: str | None = None


class Respond(Generate):
    """``POST /v1/responses``."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    n: Literal[1] = 1
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Effort | None = None
    text: TextOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    #: ``auto`` leaves out what comes first where there is too much.
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGEST)] | None = None

    # Taken, and without meaning here
    max_tool_calls: int | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @field_validator("n", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return 1 if value is None else value

    @model_validator(mode="after")
    def _here(self) -> Respond:
        for name, reason in ELSEWHERE.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: {reason}")
        return self

    @property
    def kept(self) -> bool:
        """Whether another response may go on from this one."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are told."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    def messages(self) -> list[dict[str, Any]]:
        """The new messages of the conversation.

        Raises:
            UsageError: an item is of no kind that is known here, or lacks something.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of(self.input)

    def chat(self, before: Sequence[Mapping[str, Any]]) -> Chat:
        """The same as a chat that goes on from the messages ``before``.

        Raises:
            UsageError: it cannot be said so.
        """
        common = {name: getattr(self, name) for name in Generate.model_fields if name in self.model_fields_set}
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        messages = [*first, *before, *self.messages()]
        check_outputs(messages)
        given = {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "tools": None if self.tools is None else [_tool(tool) for tool in self.tools],
            "tool_choice": _choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "response_format": self.text and self.text.format and self.text.format.for_chat(),
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
            "chat_template_kwargs": self.chat_template_kwargs,
            "thinking_token_budget": self.thinking_token_budget,
            "truncate_prompt_tokens": -1 if self.truncation == "auto" else None,
        }
        return build(Chat, common | {name: value for name, value in given.items() if value is not None}, "the request")

    def echoed(self) -> dict[str, Any]:
        """The fields of the request that are told with its response."""
        form = self.text.format if self.text is not None else None
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.reasoning and self.reasoning.effort, "summary": None},
            "store": self.kept,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as chats have it: its function within."""
    if tool.get("type") != "function" or "function" in tool:
        return tool
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(choice: str | dict[str, Any] | None) -> Any:
    """``tool_choice`` as chats have it."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
    return choice


# Items


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages that ``items`` of an input stand for: a thought and calls belong to the assistant's message beside
    them.

    Raises:
        UsageError: an item is of no kind that is known here, or lacks something.
    """
    found: list[dict[str, Any]] = []
    thought = ""
    for place, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought += _thought(item)
            continue
        if kind == "message":
            message = {"role": _text(item, place, "role"), "content": _content(item.get("content"))}
            message |= {name: item[name] for name in item if name not in ("type", "id", "status", "phase", *message)}
        elif kind == "function_call":
            function = {name: _text(item, place, name) for name in ("name", "arguments")}
            call = {"id": _text(item, place, "call_id"), "type": "function", "function": function}
            if found and found[-1]["role"] == "assistant" and not thought:
                found[-1].setdefault("tool_calls", []).append(call)
                continue
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
        elif kind == "function_call_output":
            message = {"role": "tool", "content": _content(item.get("output"))}
            message["tool_call_id"] = _text(item, place, "call_id")
        else:
            raise UsageError(
                f"item {place + 1} of the input is of the type {str(kind)[:50]!r}, and this server knows messages, "
                "function calls with their outputs, and reasoning"
            )
        if thought and message["role"] == "assistant":
            message["reasoning_content"], thought = thought, ""
        found.append(message)
    if thought:
        found.append({"role": "assistant", "content": "", "reasoning_content": thought})
    return found


def check_outputs(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises:
    UsageError: what a function returned belongs to no call before it; the message names its id.
    """
    called: set[str] = set()
    for message in messages:
        called.update(str(call.get("id")) for call in message.get("tool_calls") or ())
        id = message.get("tool_call_id")
        if id is not None and str(id) not in called:
            raise UsageError(
                f"the input has the function_call_output of {str(id)[:80]!r}, and no function call before it has this "
                "call_id",
                hint="Send the function_call along, or name the response that has it as previous_response_id.",
            )


def _text(item: Mapping[str, Any], place: int, name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise UsageError(f"item {place + 1} of the input needs the field {name!r}, a text")
    return value


def _content(content: Any) -> Any:
    """A content as chats have it: of parts, those that are text are called so."""
    if not isinstance(content, list):
        return content
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "refusal"):
        return part
    return {"type": "text", "text": part.get("refusal" if part["type"] == "refusal" else "text")}


def _thought(item: Mapping[str, Any]) -> str:
    """What an item of the kind ``reasoning`` says: its text, or else its summary."""
    parts = item.get("content") or item.get("summary") or []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))
