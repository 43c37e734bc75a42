"""DeepSeek V3 and R1: JSON in a block of code between markers."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, CallStart, Content, Functions
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import arguments_rule, calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"


@policy("serve.dialogue", "deepseek_v3")
class DeepSeekV3(Dialogue):
    """DeepSeek V3 and R1: ``function``, the name, and the arguments in a block of JSON, between markers for each call
    and for all of them. What V3.1 writes, the name and the bare arguments, is read too."""

    signs: ClassVar[tuple[str, ...]] = (CALLS, f"{FENCE}json")
    markers: ClassVar[tuple[str, ...]] = (CALLS, CALLS_END, CALL, SEP, CALL_END, "<think>", "</think>")

    def write(self, answer: Answer) -> str:
        calls = [self.begin(call.name) + call.arguments + self.close for call in answer.calls]
        row = CALLS + self.between.join(calls) + CALLS_END if calls else ""
        return self.thought(answer.reasoning) + answer.content + row

    def begin(self, name: str) -> str:
        """What is before the arguments."""
        return f"{CALL}function{SEP}{name}\n{FENCE}json\n"

    #: What is behind them, and between two calls.
    close: ClassVar[str] = f"\n{FENCE}{CALL_END}"
    between: ClassVar[str] = "\n"

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (marker := (yield from scan.say(Content, CALLS, CALL))) is not None:
            yield from scan.space()
            opened = marker == CALL or (yield from scan.take(CALL))
            if opened and (yield from self._call(scan)):
                yield from scan.take_behind_space(CALLS_END)
                scan.trim()
            else:
                yield from scan.back()

    def _call(self, scan: Scanner) -> Reading[bool]:
        """Reads a call behind its marker; whether there is one."""
        name = yield from scan.name()
        if not name or not (yield from scan.take(SEP)):
            return False
        fenced = False
        if name == "function" and (yield from scan.peek()) != "{":
            name = yield from scan.name()
            yield from scan.space()
            fenced = yield from scan.take(FENCE)
            yield from scan.take("json")
        yield from scan.space()
        start = scan.place
        if not name or not (yield from scan.take("{")):
            return False
        scan.place = start
        yield CallStart(name)
        yield from scan.arguments()
        if fenced:
            yield from scan.take_behind_space(FENCE)
        yield from scan.take_behind_space(CALL_END)
        return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        end = spell(self.close)
        calls = [f"{spell(self.begin(each.name))} {arguments_rule(each)} {end}" for each in functions.values()]
        between = spell(self.between) if self.between else ""
        return calls_grammar(calls, several, spell(CALLS), between, spell(CALLS_END))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            '{"city": "Köln"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n'
            "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        )
        return Answer("Let me see.", calls), text
