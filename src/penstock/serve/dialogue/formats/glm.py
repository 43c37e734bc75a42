"""GLM: a pair of tags for each argument."""

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
KEY, NAMED, VALUE, CLOSE = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
TAGS = tagged.Tags(KEY, NAMED, VALUE, CLOSE, (END,), between="\n")


@policy("serve.dialogue", "glm")
class Glm(Dialogue):
    """GLM-4.5 to 5: the function's name, then ``<arg_key>`` and ``<arg_value>`` for each argument, between
    ``<tool_call>`` and ``</tool_call>``. Where a schema asks more than this can be held to, a grammar writes the call
    as Hermes would."""

    signs: ClassVar[tuple[str, ...]] = (BEGIN, KEY)
    markers: ClassVar[tuple[str, ...]] = (BEGIN, END, KEY, NAMED, VALUE, CLOSE, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        calls = ["\n".join([BEGIN + call.name, *TAGS.written(call), END]) for call in answer.calls]
        return self.thought(answer.reasoning) + "\n".join([answer.content, *calls] if answer.content else calls)

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (yield from scan.say(Content, BEGIN)) is not None:
            yield from scan.space()
            if (yield from json_call(scan)):
                yield from scan.space()
                yield from scan.take(END)
                scan.trim()
            elif (yield from self._call(scan, functions)):
                scan.trim()
            else:
                yield from scan.back()

    def _call(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        """Reads a call; whether there is one."""
        name = yield from scan.name()
        start = scan.place
        yield from scan.space()
        following = yield from scan.take_one(KEY, END)
        if not name or following is None:
            return False
        scan.place = start
        yield CallStart(name)
        yield from TAGS.read(scan, functions.get(name))
        return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls, end = [], spell("\n" + END)
        for each in functions.values():
            arguments = tagged.arguments_rule(each, TAGS, spell, "\n")
            if arguments is None:
                calls.append(call_rule(each, spell, BEGIN, END))
            else:
                calls.append(f"{spell(BEGIN + each.name)} {arguments} {end}")
        return calls_grammar(calls, several, between=spell("\n")) + tagged.raw_rule(spell, CLOSE)

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln", "days": 3}'), Call("now"))
        text = (
            "Let me see.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
        )
        return Answer("Let me see.", calls), text
