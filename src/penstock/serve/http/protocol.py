"""OpenAI's requests, as far as they are understood here. No type is bent."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from penstock.core.errors import UsageError, nearest
from penstock.serve.choose.sampling import MOST, MOST_LOGPROBS, MOST_STOPS
from penstock.serve.dialogue.answer import Function, functions_of

#: Larger numbers are refused where a number counts something.
LARGEST = 2**31 - 1

Token = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Scalar = bool | int | float | str


def _token_in_digits(key: str) -> str:
    if not re.fullmatch("[0-9]{1,9}", key):
        raise ValueError(f"{key[:20]!r} is no token: its number is wanted, in digits")
    return key


#: A token as the key of an object.
TokenKey = Annotated[
    str, AfterValidator(_token_in_digits), WithJsonSchema({"type": "string", "pattern": "^[0-9]{1,9}$"})
]


class Body(BaseModel):
    """Base of all of them. Fields that are not known are kept apart: :func:`unknown` names them."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def unknown(body: BaseModel) -> Iterator[tuple[str, str]]:
    """The fields of ``body``, and of what is in it, that are not known, each with a word about the nearest that are."""
    known = {field.alias or name for name, field in type(body).model_fields.items()}
    if isinstance(body, Body):
        yield from ((name, nearest(name, known)) for name in body.model_extra or {})
    for name, field in type(body).model_fields.items():
        value = getattr(body, name)
        for place, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(each, BaseModel):
                prefix = f"{field.alias or name}." + ("" if place is None else f"{place}.")
                yield from ((prefix + inner, near) for inner, near in unknown(each))


class StreamOptions(Body):
    include_usage: bool = False


class ExpectedPart(Body):
    type: Literal["text"]
    text: str


class Expected(Body):
    """OpenAI's ``prediction``."""

    type: Literal["content"]
    content: str | list[ExpectedPart]

    def text(self) -> str:
        """The whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Generate(Body):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST)] = 1
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**62), lt=2**62)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenKey, float] | None = None

    # Beyond OpenAI's
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    #: A decoding rule: its name, or a table with the name and options.
    rule: str | dict[str, Any] | None = None
    #: Whether the engine may draft tokens ahead, where it does so.
    drafts: bool | None = None
    #: What the answer is expected to be; it is drafted from that.
    prediction: Expected | None = None
    #: A request can stand back behind others, but never push ahead of them.
    priority: Annotated[int, Field(ge=0, le=1000)] = 0

    # Taken, and without meaning here
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @field_validator("stream", "n", "priority", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def named_tokens(self) -> dict[str, Collection[int]]:
        """The tokens that each field names, but for the prompt."""
        return {"logit_bias": set(map(int, self.logit_bias or ())), "stop_token_ids": self.stop_token_ids or ()}

    def options(self) -> dict[str, Any]:
        """Those of the request's fields that are SamplingParams' too, as far as they are given."""
        given = {
            "n": self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stops(),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "stop_tokens": self.stop_token_ids and tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "rule": self.rule,
            "drafts": self.drafts,
            "prediction": self.prediction and self.prediction.text(),
        }
        return {name: value for name, value in given.items() if value is not None}


class Completion(Generate):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | list[Token] | Annotated[list[list[Token]], Field()]
    max_tokens: Count | None = 16
    best_of: Annotated[int, Field(ge=1, le=MOST)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def options(self) -> dict[str, Any]:
        given = {"best_of": self.best_of, "logprobs": self.logprobs}
        given["prompt_logprobs"] = self.logprobs if self.echo else None
        return super().options() | {name: value for name, value in given.items() if value is not None}

    def echoes(self, prompts: list[list[int]]) -> list[list[int]]:
        """For each continuation, the prompt that its text begins with; none where nothing is echoed."""
        return [prompt for prompt in prompts for _ in range(self.n)] if self.echo else []

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0] if self.prompt else 0, int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


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


class JsonSchema(Body):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer must be: OpenAI's forms, and beside them a regular expression or a grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "ebnf"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    ebnf: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        given = [name for name in ("json_schema", "regex", "ebnf") if getattr(self, name) is not None]
        wanted = [] if self.type in ("text", "json_object") else [self.type]
        others = [name for name in given if name not in wanted]
        if others:
            raise ValueError(f"the type {self.type!r} does not go with the field {' and '.join(others)}")
        if given != wanted:
            raise ValueError(f"the type {self.type!r} needs the field {self.type} beside it")
        return self

    def grammar(self) -> dict[str, Any] | None:
        """The same as SamplingParams' grammar."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"json_object": True}
        return {self.type: self.json_schema.schema_ if self.json_schema is not None else self.regex or self.ebnf}


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
    max_completion_tokens: Count | None = None
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
    response_format: ResponseFormat | None = None
    #: More variables for the chat template, such as Qwen3's enable_thinking.
    chat_template_kwargs: dict[str, Scalar] | None = None

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

    def for_template(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
        """Messages, tools and further variables, as chat templates know them."""
        tools = None if self.tool_choice == "none" else self.tools or None
        variables: dict[str, Any] = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", self.reasoning_effort)
        if self.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
        return [message.for_template() for message in self.messages], tools, variables

    def answer_options(self, turn_stops: tuple[str, ...], context: int) -> dict[str, Any]:
        """Those of SamplingParams that a chat's answer has besides: ``turn_stops`` end the assistant's turn, and
        ``context`` is the most tokens where no number is given."""
        given: dict[str, Any] = {"stop": (*self.stops(), *turn_stops)}
        if self.max_tokens is None:
            given["max_tokens"] = self.max_completion_tokens or context
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given


class Tokenize(Body):
    """``POST /tokenize``: of a text, or of a chat as its template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class Detokenize(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[Token]
