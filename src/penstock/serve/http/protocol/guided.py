"""What an answer must be, in all the ways in which clients say it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from penstock.serve.http.protocol.body import Body


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

    def grammar(self) -> dict[str, Any]:
        """The same as SamplingParams' grammar; a text, which may be any, has none."""
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


#: Fields that say what an answer must be; the first of them may also say that it is free.
GUIDED = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
