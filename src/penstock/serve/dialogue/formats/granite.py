"""Granite 3: a list of JSON objects behind a marker."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_row, written
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

CALLS, OLDER = "<|tool_call|>", "<tool_call>"


@policy("serve.dialogue", "granite")
class Granite(Dialogue):
    """Granite 3: ``<|tool_call|>`` and a list of JSON objects; ``<tool_call>`` before it, which 3.1 writes, is read
    too. Granite 4 writes as Hermes does."""

    signs: ClassVar[tuple[str, ...]] = ("<|start_of_role|>", "followed by a JSON list of tools")
    markers: ClassVar[tuple[str, ...]] = (CALLS, OLDER, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        row = f"{CALLS}[{', '.join(map(written, answer.calls))}]" if answer.calls else ""
        return self.thought(answer.reasoning) + answer.content + row

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (yield from scan.say(Content, CALLS, OLDER)) is not None:
            yield from scan.space()
            if (yield from scan.take("[")) and (yield from json_row(scan)):
                scan.trim()
            else:
                yield from scan.back()

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [call_rule(each, spell) for each in functions.values()]
        return calls_grammar(calls, several, spell(f"{CALLS}["), spell(", "), spell("]"))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            'Let me see.<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Köln"}}, '
            '{"name": "now", "arguments": {}}]'
        )
        return Answer("Let me see.", calls), text
