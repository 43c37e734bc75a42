"""OpenAI's chats."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from penstock.core.errors import UsageError
from penstock.models.chats import Message
from penstock.serve.chat import with_place
from penstock.serve.choose.sampling import MOST_LOGPROBS
from penstock.serve.dialogue.answer import Function, functions_of
from penstock.serve.http.protocol.body import LARGEST, Body
from penstock.serve.http.protocol.generate import Generate
from penstock.serve.http.protocol.searches import SearchField

#: What the parts of a message may be that is no text.
OTHER_PARTS = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "audio_url": "sounds",
    "input_audio": "sounds",
    "video_url": "videos",
    "file": "files",
    "input_file": "files",
}


class Part(Body):
    """A piece of a message: text is the only kind."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, fields: Any) -> Any:
        kind = fields.get("type") if isinstance(fields, dict) else None
        if isinstance(kind, str) and kind != "text":
            what = OTHER_PARTS.get(kind, f"parts of the type {kind[:50]!r}")
            raise ValueError(f"{what} are not supported: a message is text")
        return fields


#: What an assistant may say instead of a content.
INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "refusal")


class ChatMessage(BaseModel):
    """A message; fields that are not named here go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        others = {"tool_calls": self.tool_calls, **(self.model_extra or {})}
        if self.content is None and not (self.role == "assistant" and any(others.get(name) for name in INSTEAD)):
            raise ValueError(f"a message of the role {self.role!r} needs a content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: its content one text."""
        fields = self.model_dump(exclude_none=True)
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return fields | {"content": text}


class FunctionName(Body):
    name: str


class NamedFunction(Body):
    """``tool_choice``: this function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class AllowedFunctions(Body):
    """``tool_choice``: some of the functions."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class Chat(Generate):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    #: ``any`` is what some clients say for ``required``.
    tool_choice: Literal["auto", "none", "required", "any"] | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    #: How much the model is to think, where its template has that; ``none`` is not at all.
    reasoning_effort: str | None = None
    #: The most tokens of a thought.
    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    #: Whether thoughts are told.
    include_reasoning: bool = True
    #: In place of the model's own, where the server lets requests bring one.
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    #: Whether the answer goes on with the last message, which the assistant began.
    continue_final_message: bool = False
    #: Whether the prompt ends where the assistant's message begins; not where it is to go on.
    add_generation_prompt: bool | None = None
    #: Whether the tokens that the model wants around a text are added to what the template wrote.
    add_special_tokens: bool = False
    #: More variables for the chat template, such as Qwen3's enable_thinking.
    chat_template_kwargs: dict[str, Any] | None = None
    #: A program that spends a budget on the answer.
    search: SearchField | None = None

    @model_validator(mode="after")
    def _one_end(self) -> Chat:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs, set to true, beside it")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message goes on with a message of the assistant, and the last is none")
        return self

    @property
    def wanted(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def opened(self) -> bool | None:
        """Whether the prompt ends where the assistant's message begins; None is what the template does then."""
        return False if self.continue_final_message else self.add_generation_prompt

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        if isinstance(self.tool_choice, AllowedFunctions):
            return self.tool_choice.allowed_tools.mode == "required"
        return isinstance(self.tool_choice, NamedFunction) or self.tool_choice in ("required", "any")

    def callable(self) -> dict[str, Function]:
        """The functions that may be called here, by name.

        Raises:
            UsageError: one that is chosen is none of the tools, or one has to be called and there is none.
        """
        functions = functions_of(self.tools)
        if self.must_call and not functions:
            raise UsageError("tool_choice wants a call, and there are no tools")
        if self.tool_choice == "none":
            return {}
        if isinstance(self.tool_choice, NamedFunction | AllowedFunctions):
            one = isinstance(self.tool_choice, NamedFunction)
            chosen = [self.tool_choice] if one else self.tool_choice.allowed_tools.tools  # type: ignore[union-attr]
            names = [each.function.name for each in chosen]  # type: ignore[union-attr]
            unknown = next((name for name in names if name not in functions), None)
            if unknown is not None:
                raise UsageError(f"tool_choice names {unknown!r}, which is none of the tools")
            return {name: functions[name] for name in names}
        return functions

    def for_template(self) -> tuple[list[Message], list[dict[str, Any]] | None, dict[str, Any]]:
        """Messages, tools and further variables, as chat templates know them."""
        tools = None if self.tool_choice == "none" else self.tools or None
        variables: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        if self.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
        if self.continue_final_message:
            variables["continue_final_message"] = True
        if self.opened is not None:
            variables["add_generation_prompt"] = self.opened
        messages: list[Message] = [message.for_template() for message in self.messages]
        return with_place(messages) if self.contexts else messages, tools, variables

    def answer_options(self, turn_stops: tuple[str, ...], context: int) -> dict[str, Any]:
        """Those of SamplingParams that a chat's answer has besides: ``turn_stops`` end the assistant's turn, and
        ``context`` is the most tokens where no number is given."""
        given: dict[str, Any] = {"stop": (*self.stops(), *turn_stops)}
        if self.wanted is None:
            given["max_tokens"] = context
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given
