"""OpenAI's requests, as far as they are understood here. No type is bent."""

from __future__ import annotations

import json
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
from penstock.serve.choose.sampling import (
    LONGEST_BAD,
    MOST,
    MOST_ALLOWED,
    MOST_BAD,
    MOST_LOGPROBS,
    MOST_STOPS,
)
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


class StructuredOutputs(Body):
    """vLLM's way to say what an answer must be: exactly one of these."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar_: str | None = Field(None, alias="grammar")
    json_object: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        known = ("json_", "regex", "choice", "grammar_", "json_object")
        if sum(getattr(self, name) not in (None, False) for name in known) != 1:
            raise ValueError("exactly one of json, regex, choice, grammar and json_object says what the answer must be")
        return self

    def grammar(self) -> dict[str, Any]:
        """The same as SamplingParams' grammar."""
        if self.choice is not None:
            return {"ebnf": f"start: {' | '.join(map(json.dumps, self.choice))}"}
        given = {"json_schema": self.json_, "regex": self.regex, "ebnf": self.grammar_, "json_object": self.json_object}
        return {name: value for name, value in given.items() if value not in (None, False)}


#: Fields that say what an answer must be.
GUIDED = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


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
    #: 0 and -1 are no limit.
    top_k: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool | None = None
    #: No other tokens come, not even such as would end the text.
    allowed_token_ids: Annotated[list[Token], Field(min_length=1, max_length=MOST_ALLOWED)] | None = None
    #: Texts that do not come.
    bad_words: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_BAD)]], Field(max_length=MOST_BAD)] | None
    ) = None
    #: What the answer must be, in any of three ways to say it.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    #: Log-probabilities of the prompt's tokens.
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    #: Whether the answer tells its tokens, and the prompt's.
    return_token_ids: bool | None = None
    #: Whether the stop string that ended the text is part of it.
    include_stop_str_in_output: bool | None = None
    #: Whether special tokens are left out of the text.
    skip_special_tokens: bool | None = None
    #: So many of the prompt's last tokens are read; -1 are as many as fit.
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
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

    @model_validator(mode="after")
    def _goes_together(self) -> Generate:
        guided = [name for name in GUIDED if getattr(self, name) is not None]
        if len(guided) > 1:
            raise ValueError(f"what the answer must be is said once, not by {' and '.join(guided)}")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("a stream has no prompt_logprobs")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens 0 would leave nothing of the prompt")
        return self

    def grammar(self) -> dict[str, Any] | None:
        """What the text must be, as SamplingParams' grammar."""
        form = self.response_format or self.structured_outputs
        if form is not None:
            return form.grammar()
        given = {name.removeprefix("guided_"): getattr(self, name) for name in GUIDED if name.startswith("guided_")}
        given = {name: value for name, value in given.items() if value is not None}
        return StructuredOutputs.model_validate(given).grammar() if given else None

    def truncated(self, prompt: list[int], context: int) -> list[int]:
        """What is read of a prompt, where a sequence has ``context`` tokens."""
        most = self.truncate_prompt_tokens
        return prompt if most is None else prompt[-(context - 1 if most == -1 else most) :]

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def named_tokens(self) -> dict[str, Collection[int]]:
        """The tokens that each field names, but for the prompt."""
        return {
            "logit_bias": set(map(int, self.logit_bias or ())),
            "stop_token_ids": self.stop_token_ids or (),
            "allowed_token_ids": self.allowed_token_ids or (),
        }

    def options(self) -> dict[str, Any]:
        """Those of the request's fields that are SamplingParams' too, as far as they are given."""
        given = {
            "n": self.n,
            "max_tokens": None if self.max_tokens is None else max(self.max_tokens, 1),
            "grammar": self.grammar(),
            "prompt_logprobs": self.prompt_logprobs,
            "include_stop": self.include_stop_str_in_output,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stops(),
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            "top_k": self.top_k if self.top_k not in (0, -1) else None,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "stop_tokens": self.stop_token_ids and tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "allowed_tokens": self.allowed_token_ids and tuple(self.allowed_token_ids),
            "bad_words": self.bad_words and tuple(self.bad_words),
            "rule": self.rule,
            "drafts": self.drafts,
            "prediction": self.prediction and self.prediction.text(),
        }
        return {name: value for name, value in given.items() if value is not None}


class Completion(Generate):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | list[Token] | Annotated[list[list[Token]], Field()]
    #: 0 is none: the prompt alone is scored.
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = 16
    add_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=MOST)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    def options(self) -> dict[str, Any]:
        given = {"best_of": self.best_of, "logprobs": self.logprobs}
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
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


def _of_the_operator(template: str | None) -> str | None:
    if template is not None:
        raise ValueError("a chat template is a program, and whoever runs the server gives it, by --chat-template FILE")
    return template


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
    chat_template: Annotated[str | None, AfterValidator(_of_the_operator)] = None
    #: Whether the answer goes on with the last message, which the assistant began.
    continue_final_message: bool = False
    #: Whether the prompt ends where the assistant's message begins; not where it is to go on.
    add_generation_prompt: bool | None = None
    #: Whether the tokens that the model wants around a text are added to what the template wrote.
    add_special_tokens: bool = False
    #: More variables for the chat template, such as Qwen3's enable_thinking.
    chat_template_kwargs: dict[str, Scalar] | None = None

    @model_validator(mode="after")
    def _one_end(self) -> Chat:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message goes on with a message of the assistant, and the last is none")
        return self

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

    def for_template(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
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
