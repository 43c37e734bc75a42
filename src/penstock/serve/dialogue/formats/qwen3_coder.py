"""Qwen3-Coder: a tag for each argument."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue import tagged
from penstock.serve.dialogue.answer import Answer, Call, CallStart, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_call
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, CLOSE = "<function=", "</function>"


@policy("serve.dialogue", "qwen3_coder")
class Qwen3Coder(Dialogue):
    """Qwen3-Coder, Qwen3.5 and Nemotron 3: ``<function=NAME>`` with a ``<parameter=NAME>`` for each argument, between
    ``<tool_call>`` tags, which may be left out. Where a schema asks more than this can be held to, a grammar writes the
    call as Hermes would."""

    signs: ClassVar[tuple[str, ...]] = (BEGIN, FUNCTION)
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, "<think>", "</think>")

    #: What a call, and each of its arguments, stands between.
    around: ClassVar[tuple[str, str]] = (BEGIN, END)
    arguments: ClassVar[tagged.Tags] = tagged.Tags("<parameter=", ">", "", "</parameter>", (CLOSE, END), "\n")

    def write(self, answer: Answer) -> str:
        calls = [self._written(call) for call in answer.calls]
        return self.thought(answer.reasoning) + "\n".join([answer.content, *calls] if answer.content else calls)

    def _written(self, call: Call) -> str:
        begin, end = self.around
        return "\n".join([begin, f"{FUNCTION}{call.name}>", *self.arguments.written(call), CLOSE, end])

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        begin, end = self.around
        while (marker := (yield from scan.say(Content, begin, FUNCTION))) is not None:
            if marker == begin:
                yield from scan.space()
            if (yield from self._call(scan, functions, marker == begin)):
                yield from scan.space()
                yield from scan.take(end)
                scan.trim()
            else:
                yield from scan.back()

    def _call(self, scan: Scanner, functions: Functions, outside: bool) -> Reading[bool]:
        """Reads a call, from before ``<function=`` if ``outside`` of it; whether there is one."""
        if outside and (yield from json_call(scan)):
            return True
        if outside and not (yield from scan.take(FUNCTION)):
            return False
        name = yield from scan.name()
        if not name or not (yield from scan.take(">")):
            return False
        yield CallStart(name)
        yield from self.arguments.read(scan, functions.get(name))
        return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        (begin, end), calls = self.around, []
        for each in functions.values():
            arguments = tagged.arguments_rule(each, self.arguments, spell, "\n")
            if arguments is None:
                calls.append(call_rule(each, spell, f"{begin}\n", f"\n{end}"))
            else:
                opening, closing = spell(f"{begin}\n{FUNCTION}{each.name}>"), spell(f"\n{CLOSE}\n{end}")
                calls.append(f"{opening} {arguments} {closing}")
        return calls_grammar(calls, several, between=spell("\n")) + tagged.raw_rule(spell, self.arguments.end)

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln", "days": 3}'), Call("now"))
        text = (
            "Let me see.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n"
            "3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"
        )
        return Answer("Let me see.", calls), text
