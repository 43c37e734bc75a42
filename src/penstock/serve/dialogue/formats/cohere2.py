"""Command R7B and Command A: a list of JSON objects between markers, and markers around all that is said."""

from __future__ import annotations

from typing import ClassVar

from penstock.core.strict_json import as_json
from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Content, Function, Functions
from penstock.serve.dialogue.calls import json_row
from penstock.serve.dialogue.contract import Dialogue, Spell, Thinking, lead
from penstock.serve.dialogue.lark import arguments_rule, calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

ACTION, ACTION_END = "<|START_ACTION|>", "<|END_ACTION|>"
THINK, THOUGHT = "<|START_THINKING|>", "<|END_THINKING|>"
RESPONSE, RESPONSE_END = "<|START_RESPONSE|>", "<|END_RESPONSE|>"


@policy("serve.dialogue", "cohere2")
class Cohere2(Dialogue):
    """Command R7B and Command A: between ``<|START_ACTION|>`` and ``<|END_ACTION|>`` a list of JSON objects, whose
    calls are numbered; thoughts between ``<|START_THINKING|>`` and its like, and what is said between
    ``<|START_RESPONSE|>`` and its like. The numbers begin anew with each answer, so they are not a call's id. What is
    said before calls is written as in an answer without any (ours: the template leaves it out)."""

    signs: ClassVar[tuple[str, ...]] = (ACTION, RESPONSE)
    markers: ClassVar[tuple[str, ...]] = (ACTION, ACTION_END, THINK, THOUGHT, RESPONSE, RESPONSE_END)
    tags: ClassVar[tuple[str, str]] = (THINK, THOUGHT)
    ends: ClassVar[tuple[str, ...]] = ("<|END_OF_TURN_TOKEN|>",)

    def write(self, answer: Answer) -> str:
        said = f"{RESPONSE}{answer.content}{RESPONSE_END}" if answer.content else ""
        calls = [_opened(str(number), call.name) + call.arguments + "}" for number, call in enumerate(answer.calls)]
        row = f"{ACTION}[\n    " + ",\n    ".join(calls) + f"\n]{ACTION_END}" if calls else ""
        return self.thought(answer.reasoning) + said + row

    def thought(self, reasoning: str) -> str:
        return f"{THINK}{reasoning}{THOUGHT}" if reasoning else ""

    def read(self, scan: Scanner, functions: Functions, begun: bool) -> Reading[None]:
        yield from super().read(scan, {}, begun)
        yield from self.calls(scan, functions)

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        marks = (RESPONSE, RESPONSE_END, *((ACTION,) if functions else ()))
        while (marker := (yield from scan.say(Content, *marks))) is not None:
            if marker != ACTION:
                scan.trim()
                continue
            yield from scan.space()
            if (yield from scan.take("[")) and (yield from json_row(scan)):
                yield from scan.take_behind_space(ACTION_END)
                scan.trim()
            else:
                yield from scan.back()

    def lead(self, thinking: Thinking, budget: int | None, spell: Spell, called: bool) -> str:
        begin, end = map(spell, self.tags)
        opening = "" if called else spell(RESPONSE)
        if thinking is Thinking.NOT:
            return opening and f"lead: {opening}\n"
        return lead("" if thinking is Thinking.BEGUN else begin, end, budget, thinking is Thinking.MAY, "", opening)

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [_rule(each, spell) for each in functions.values()]
        return calls_grammar(calls, several, spell(f"{ACTION}[\n    "), spell(",\n    "), spell(f"\n]{ACTION_END}"))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            "<|START_THINKING|>Which city?<|END_THINKING|><|START_ACTION|>[\n"
            '    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Köln"}},\n'
            '    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>'
        )
        return Answer("", calls, "Which city?"), text


def _opened(number: str, name: str) -> str:
    """What is before the arguments of a call."""
    return f'{{"tool_call_id": "{number}", "tool_name": {as_json(name)}, "parameters": '


def _rule(function: Function, spell: Spell) -> str:
    """Terminals for a call of ``function``."""
    before, behind = _opened("0", function.name).split("0", 1)
    return f"{spell(before)} /[0-9]+/ {spell(behind)} {arguments_rule(function)} {spell('}')}"
