"""Phi-4-mini: a list of JSON objects between markers."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_call, json_row, written
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

BEGIN, END = "<|tool_call|>", "<|/tool_call|>"

#: What it writes instead where the prompt asks for this.
FUNCTOOLS = "functools["


@policy("serve.dialogue", "phi4_mini")
class Phi4Mini(Dialogue):
    """Phi-4-mini: a list of JSON objects between ``<|tool_call|>`` and ``<|/tool_call|>``. A single object there, and
    a list behind ``functools``, which other templates for the model ask for, are read too."""

    signs: ClassVar[tuple[str, ...]] = ("<|tool|>", "<|/tool|>")
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        row = f"{BEGIN}[{', '.join(map(written, answer.calls))}]{END}" if answer.calls else ""
        return self.thought(answer.reasoning) + answer.content + row

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (marker := (yield from scan.say(Content, BEGIN, FUNCTOOLS))) is not None:
            yield from scan.space()
            row = marker == FUNCTOOLS or (yield from scan.take("["))
            if (yield from json_row(scan) if row else json_call(scan)):
                yield from scan.take_behind_space(END)
                scan.trim()
            else:
                yield from scan.back()

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [call_rule(each, spell) for each in functions.values()]
        return calls_grammar(calls, several, spell(f"{BEGIN}["), spell(", "), spell(f"]{END}"))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            'Let me see.<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Köln"}}, '
            '{"name": "now", "arguments": {}}]<|/tool_call|>'
        )
        return Answer("Let me see.", calls), text
