"""OpenAI's completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from penstock.serve.choose.sampling import MOST, MOST_LOGPROBS
from penstock.serve.http.protocol.body import LARGEST, Token
from penstock.serve.http.protocol.generate import Generate


class Completion(Generate):
    """``POST /v1/completions``."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | list[Token] | Annotated[list[list[Token]], Field()]
    max_tokens: Annotated[int, Field(ge=0, le=LARGEST)] | None = 16
    add_special_tokens: bool = True
    best_of: Annotated[int, Field(ge=1, le=MOST)] | None = None
    echo: bool = False
    #: What stands before the contexts.
    contexts_prefix: str = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    #: The first token of the prompt, counted from 0, whose log-probability is told.
    prompt_logprobs_from: Annotated[int, Field(ge=0, le=LARGEST)] | None = None

    @model_validator(mode="after")
    def _is_told(self) -> Completion:
        if self.prompt_logprobs_from is not None and (self.prompt_logprobs is None or self.echo):
            raise ValueError("prompt_logprobs_from goes with prompt_logprobs, and without echo, which tells all tokens")
        return self

    def options(self) -> dict[str, Any]:
        names = ("best_of", "logprobs", "prompt_logprobs_from")
        given = {name: getattr(self, name) for name in names}
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return super().options() | {name: value for name, value in given.items() if value is not None}

    @property
    def special(self) -> bool:
        """Whether the tokens that the model wants around a text are added to prompts: with contexts, they are with what
        stands before these."""
        return self.add_special_tokens and not self.contexts

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
