"""What all requests for texts have in common."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from penstock.serve.choose.sampling import (
    LONGEST_BAD,
    MOST,
    MOST_ALLOWED,
    MOST_BAD,
    MOST_LOGPROBS,
    MOST_STOPS,
)
from penstock.serve.http.protocol.body import LARGEST, Body, Token, TokenKey
from penstock.serve.http.protocol.guided import GUIDED, ResponseFormat, StructuredOutputs

#: Of a request.
MOST_CONTEXTS = 1024


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
    #: 0 is none: the prompt alone is read, and scored where that is asked for.
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = None
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
    #: Whether the stop string, or the token of stop_token_ids, that ended the text is part of it.
    include_stop_str_in_output: bool | None = None
    #: Whether special tokens are left out of the text.
    skip_special_tokens: bool | None = None
    #: So many of the prompt's last tokens are read; -1 are as many as leave room for the answer.
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=LARGEST)] | None = None
    #: A decoding rule: its name, or a table with the name and options.
    rule: str | dict[str, Any] | None = None
    #: Whether the engine may draft tokens ahead, where it does so.
    drafts: bool | None = None
    #: What the answer is expected to be; it is drafted from that.
    prediction: Expected | None = None
    #: ``full``: all keys and values of the request are kept, where the server compresses those of others.
    kv: Literal["full"] | None = None
    #: Texts, such as documents that were found, or their tokens: just as they are, they stand before the prompt, or
    #: before the text of the user's first message.
    contexts: (
        Annotated[
            list[Annotated[str, Field(min_length=1)] | Annotated[list[Token], Field(min_length=1)]],
            Field(max_length=MOST_CONTEXTS),
        ]
        | None
    ) = None
    #: A request can stand back behind others, but never push ahead of them.
    priority: Annotated[int, Field(ge=0, le=1000)] = 0

    # Taken; what is stored matters to responses alone, and the others have no meaning here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Generate:
        free = self.response_format is not None and self.response_format.type == "text"
        guided = [name for name in (GUIDED[1:] if free else GUIDED) if getattr(self, name) is not None]
        if len(guided) > 1:
            raise ValueError(f"what the answer must be is said once, not by {' and '.join(guided)}")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens 0 would leave nothing of the prompt")
        if self.contexts and self.truncate_prompt_tokens is not None:
            raise ValueError("truncate_prompt_tokens cuts the prompt's beginning, behind which contexts stand")
        return self

    def grammar(self) -> dict[str, Any] | None:
        """What the text must be, as SamplingParams' grammar."""
        if self.response_format is not None and self.response_format.type != "text":
            return self.response_format.grammar()
        if self.structured_outputs is not None:
            return self.structured_outputs.grammar()
        given = {name.removeprefix("guided_"): getattr(self, name) for name in GUIDED if name.startswith("guided_")}
        given = {name: value for name, value in given.items() if value is not None}
        return StructuredOutputs.model_validate(given).grammar() if given else None

    @property
    def wanted(self) -> int | None:
        """The most tokens of an answer; None where the request does not say."""
        return self.max_tokens

    def truncated(self, prompt: list[int], context: int) -> list[int]:
        """What is read of a prompt, where a sequence has ``context`` tokens, of which the answer needs no more than
        half."""
        most = self.truncate_prompt_tokens
        if most is None:
            return prompt
        room = max(1, min(context // 2, context if self.wanted is None else self.wanted))
        return prompt[-(context - room if most == -1 else most) :]

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
            "max_tokens": None if self.wanted is None else max(self.wanted, 1),
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
            "kv": self.kv,
        }
        return {name: value for name, value in given.items() if value is not None}
