"""Olmo 3: calls as Python writes them, a line each, between tags."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Content, Functions
from penstock.serve.dialogue.calls import call_rule
from penstock.serve.dialogue.contract import Spell
from penstock.serve.dialogue.formats.pythonic import Pythonic, python_call, python_rule
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

BEGIN, END = "<function_calls>", "</function_calls>"


@policy("serve.dialogue", "olmo3")
class Olmo3(Pythonic):
    """Olmo 3: ``f(city="Köln")`` for each call, a line each, between ``<function_calls>`` and ``</function_calls>``, if
    there are such functions; all arguments are named, and literals. Where a schema asks more than a grammar can hold
    this to, it writes a JSON object there."""

    signs: ClassVar[tuple[str, ...]] = (BEGIN, "<functions>")
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        calls = "\n".join(map(python_call, answer.calls))
        return self.thought(answer.reasoning) + answer.content + (f"{BEGIN}{calls}{END}" if calls else "")

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (yield from scan.say(Content, BEGIN)) is not None:
            found = False
            while (yield from self._call(scan, functions)):
                found = True
            if found:
                yield from scan.space()
                yield from scan.take(END)
                scan.trim()
            else:
                yield from scan.back()

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [python_rule(each, spell) or call_rule(each, spell) for each in functions.values()]
        return calls_grammar(calls, several, spell(BEGIN), spell("\n"), spell(END))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln", "days": 3}'), Call("now"))
        text = 'Let me see.<function_calls>get_weather(city="Köln", days=3)\nnow()</function_calls>'
        return Answer("Let me see.", calls), text
