"""MiniMax-M2: a tag for each argument, and one pair around all calls."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue import tagged
from penstock.serve.dialogue.answer import Answer, Call, CallStart, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_call
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

BEGIN, END = "<minimax:tool_call>", "</minimax:tool_call>"
INVOKE, NAMED, CLOSE = '<invoke name="', '">', "</invoke>"
TAGS = tagged.Tags('<parameter name="', NAMED, "", "</parameter>", (CLOSE,))


@policy("serve.dialogue", "minimax_m2")
class MiniMaxM2(Dialogue):
    """MiniMax-M2: ``<invoke name="NAME">`` with a ``<parameter name="NAME">`` for each argument, one pair of
    ``<minimax:tool_call>`` tags around all calls. Where a schema asks more than this can be held to, a grammar writes
    the call there as a JSON object."""

    signs: ClassVar[tuple[str, ...]] = (BEGIN, INVOKE)
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        calls = ["\n".join([f"{INVOKE}{call.name}{NAMED}", *TAGS.written(call), CLOSE]) for call in answer.calls]
        block = ["\n".join([BEGIN, *calls, END])] if calls else []
        return self.thought(answer.reasoning) + "\n".join([answer.content, *block] if answer.content else block)

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (yield from scan.say(Content, BEGIN)) is not None:
            if (yield from self._row(scan, functions)):
                yield from scan.space()
                yield from scan.take(END)
                scan.trim()
            else:
                yield from scan.back()

    def _row(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        """Reads calls in a row; whether there is any."""
        found = False
        while True:
            start = scan.place
            yield from scan.space()
            if not (yield from self._call(scan, functions)):
                scan.place = start
                return found
            found = True

    def _call(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        """Reads a call; whether there is one."""
        if (yield from json_call(scan)):
            return True
        if not (yield from scan.take(INVOKE)):
            return False
        name = yield from scan.name()
        if not name or not (yield from scan.take(NAMED)):
            return False
        yield CallStart(name)
        yield from TAGS.read(scan, functions.get(name))
        return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls, end = [], spell("\n" + CLOSE)
        for each in functions.values():
            arguments = tagged.arguments_rule(each, TAGS, spell, "\n")
            if arguments is None or '"' in "".join(each.parameters.get("properties", ())):
                calls.append(call_rule(each, spell))
            else:
                calls.append(f"{spell(f'{INVOKE}{each.name}{NAMED}')} {arguments} {end}")
        rules = calls_grammar(calls, several, spell(f"{BEGIN}\n"), spell("\n"), spell("\n" + END))
        return rules + tagged.raw_rule(spell, TAGS.end)

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln", "days": 3}'), Call("now"))
        text = (
            'Let me see.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Köln</parameter>\n'
            '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
        )
        return Answer("Let me see.", calls), text
