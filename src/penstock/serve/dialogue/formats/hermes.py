"""Hermes and Qwen: JSON between tags."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_call, written
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

BEGIN, END = "<tool_call>", "</tool_call>"


@policy("serve.dialogue", "hermes")
class Hermes(Dialogue):
    """Hermes 2 Pro and 3, Qwen2.5, Qwen3, and whatever template says nothing of a format of its own: each call is a
    JSON object between ``<tool_call>`` and ``</tool_call>``."""

    signs: ClassVar[tuple[str, ...]] = (BEGIN,)
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        calls = [f"{BEGIN}\n{written(call)}\n{END}" for call in answer.calls]
        return self.thought(answer.reasoning) + "\n".join([answer.content, *calls] if answer.content else calls)

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (yield from scan.say(Content, BEGIN)) is not None:
            yield from scan.space()
            if (yield from json_call(scan)):
                yield from scan.space()
                yield from scan.take(END)
                scan.trim()
            else:
                yield from scan.back()

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [call_rule(each, spell, f"{BEGIN}\n", f"\n{END}") for each in functions.values()]
        return calls_grammar(calls, several, between=spell("\n"))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        )
        return Answer("Let me see.", calls), text
