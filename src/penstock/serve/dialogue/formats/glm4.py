"""GLM-4 before 4.5: the name on a line, the arguments on the next."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, CallStart, Content, Functions
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import arguments_rule, calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

TURN = "<|assistant|>"


@policy("serve.dialogue", "glm4")
class Glm4(Dialogue):
    """GLM-4 and GLM-Z1, before 4.5: an answer that begins with the name of a function on a line by itself, and a JSON
    object behind it, is a call, if there is such a function; so is what begins so behind ``<|assistant|>``."""

    signs: ClassVar[tuple[str, ...]] = ("[gMASK]", "可用工具")
    markers: ClassVar[tuple[str, ...]] = (TURN, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        calls = [f"{call.name}\n{call.arguments}" for call in answer.calls]
        return self.thought(answer.reasoning) + TURN.join([answer.content, *calls] if answer.content else calls)

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        start = scan.place
        yield from scan.space()
        if not (yield from self._call(scan, functions)):
            scan.place = start
        while (yield from scan.say(Content, TURN)) is not None:
            yield from scan.space()
            if not (yield from self._call(scan, functions)):
                yield from scan.back()

    def _call(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        """Reads a call; whether there is one."""
        name = yield from scan.name()
        if name not in functions or "\n" not in (yield from scan.space()) or (yield from scan.peek()) != "{":
            return False
        yield CallStart(name)
        yield from scan.arguments()
        scan.trim()
        return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [spell(each.name + "\n") + f" {arguments_rule(each)}" for each in functions.values()]
        return calls_grammar(calls, several, between=spell(TURN))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        return Answer("Let me see.", calls), 'Let me see.<|assistant|>get_weather\n{"city": "Köln"}<|assistant|>now\n{}'
