"""What a chat asks for: its prompt, the form of its answer, and how the answer is read."""

from __future__ import annotations

import dataclasses
from typing import Any

from penstock.serve.chat import Prompt
from penstock.serve.dialogue.answer import (
    Answer,
    Arguments,
    CallStart,
    Content,
    Event,
    Functions,
    Reasoning,
    gathered,
)
from penstock.serve.dialogue.contract import Dialogue, Reader, Thinking
from penstock.serve.dialogue.lark import check_functions
from penstock.serve.http.protocol.chats import Chat
from penstock.serve.http.text import Tokens


@dataclasses.dataclass(frozen=True)
class Form:
    """How an answer is read.

    Attributes:
        dialogue: the model's format.
        functions: whose calls are read; with none, what looks like a call is content.
        thinking: what the answer may begin with.
        single: the first call is the last.
        told: whether thoughts are told.
    """

    dialogue: Dialogue
    functions: Functions
    thinking: Thinking
    single: bool = False
    told: bool = True

    @property
    def marked(self) -> bool:
        """Whether markers are part of the text."""
        return bool(self.functions) or self.thinking is not Thinking.NOT


def ask(body: Chat, tokens: Tokens, context: int) -> tuple[Prompt, dict[str, Any], Form]:
    """The prompt of a chat, what its answer asks of SamplingParams besides the fields that they have in common, and how
    the answer is read. ``context`` is the most tokens of an answer where no number is given.

    Raises:
        UsageError: the model's template does not take these messages, or the tools cannot be called so.
    """
    functions = body.callable()
    prompt = tokens.chat(*body.for_template(), body.add_special_tokens, body.chat_template)
    thinking = tokens.dialogue.thinking(body.chat_template or tokens.template, prompt.text)
    form = Form(tokens.dialogue, functions, thinking, body.parallel_tool_calls is False, body.include_reasoning)
    options = body.answer_options(tokens.turn_stops if body.chat_template is None else (), context)
    grammar = _grammar(body, tokens, form)
    read = dataclasses.replace(prompt, tokens=body.truncated(prompt.tokens, context))
    return read, options if grammar is None else options | {"grammar": grammar}, form


def _grammar(body: Chat, tokens: Tokens, form: Form) -> dict[str, Any] | None:
    """What the answer must be: a call where one has to be made, else what ``response_format`` says; behind a thought,
    on which it has no hold but for its length."""
    dialogue, spell, budget = form.dialogue, tokens.spell, body.thinking_token_budget
    if body.must_call:
        named = len(form.functions) == 1 and not isinstance(body.tool_choice, str)
        check_functions(form.functions)
        rules = dialogue.rules(form.functions, not (form.single or named), spell)
        grammar: dict[str, Any] | None = {"ebnf": rules}
    else:
        grammar = body.grammar()
    if grammar is None and (budget is None or form.thinking is Thinking.NOT):
        return None
    lead = dialogue.lead(form.thinking, budget, spell, body.must_call or grammar is None)
    if grammar is None:
        grammar = {"ebnf": dialogue.free(form.thinking, spell)}
    return grammar | ({"lead": lead} if lead else {})


class AnswerReader:
    """Reads an answer into OpenAI's messages and deltas."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._reader = Reader(form.dialogue, form.functions, form.thinking is Thinking.BEGUN)
        self._calls = self._told = -1

    def read(self, text: str, ended: bool) -> list[dict[str, Any]]:
        """What ``text``, the last where it has ``ended``, adds, as deltas."""
        return [self._delta(event) for event in self.events(text, ended)]

    def events(self, text: str, ended: bool) -> list[Event]:
        """The same as events; thoughts are among them where they are told."""
        found = self._kept(self._reader.read(text) + (self._reader.end() if ended else []))
        return [event for event in found if self._form.told or not isinstance(event, Reasoning)]

    def message(self, text: str) -> dict[str, Any]:
        """The message of a whole answer."""
        answer = gathered(self.events(text, True))
        message: dict[str, Any] = {"role": "assistant", "content": _said(answer), "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                _call(call.id or self._form.dialogue.new_id(), call.name, call.arguments) for call in answer.calls
            ]
        return message

    @property
    def beyond(self) -> bool:
        """Whether a second call has begun."""
        return self._calls > 0

    def reason(self, finish: str | None) -> str | None:
        """OpenAI's word for the end of an answer that ended for the reason ``finish``."""
        return "tool_calls" if finish == "stop" and self._calls >= 0 else finish

    def _kept(self, events: list[Event]) -> list[Event]:
        """Those of ``events`` that are told: with a single call, not those of further ones."""
        kept: list[Event] = []
        for event in events:
            self._calls += isinstance(event, CallStart)
            further = self._form.single and self.beyond
            if not (further and isinstance(event, CallStart | Arguments)):
                kept.append(event)
        return kept

    def _delta(self, event: Event) -> dict[str, Any]:
        match event:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStart(name, id):
                self._told += 1
                return {"tool_calls": [{"index": self._told, **_call(id or self._form.dialogue.new_id(), name, "")}]}
            case Arguments(text):
                return {"tool_calls": [{"index": self._told, "function": {"arguments": text}}]}


def _said(answer: Answer) -> str | None:
    """The content of a message: none where the model says nothing beside its calls or thoughts."""
    return answer.content or (None if answer.calls or answer.reasoning else "")


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
