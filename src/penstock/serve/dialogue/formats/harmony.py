"""gpt-oss: messages in channels."""

from __future__ import annotations

import re
from typing import ClassVar

from penstock.core.errors import UsageError
from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Arguments, Call, CallStart, Content, Functions, Reasoning
from penstock.serve.dialogue.contract import Dialogue, Spell, Thinking, lead
from penstock.serve.dialogue.lark import arguments_rule, calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"

#: What stands between the start of a message, or its channel, and its text.
HEADER = re.compile(
    r"(?:assistant)?\s*(?:to=(?P<early>[^\s<]+))?\s*(?:<\|channel\|>)?(?P<channel>analysis|commentary|final)"
    r"\s*(?:to=(?P<late>[^\s<]+))?\s*(?:<\|constrain\|>)?\s*(?:json|code)?\s*"
)


@policy("serve.dialogue", "harmony")
class Harmony(Dialogue):
    """gpt-oss: thoughts in the channel ``analysis``, calls in ``commentary`` to ``functions.NAME``, the answer in
    ``final``, and what is said before a call in ``commentary`` to nobody. A call ends the answer."""

    signs: ClassVar[tuple[str, ...]] = (CHANNEL, START)
    markers: ClassVar[tuple[str, ...]] = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)
    ends: ClassVar[tuple[str, ...]] = (CALL, RETURN)

    def write(self, answer: Answer) -> str:
        messages = [f"{CHANNEL}analysis{MESSAGE}{answer.reasoning}{END}"] if answer.reasoning else []
        if not answer.calls:
            messages.append(f"{CHANNEL}final{MESSAGE}{answer.content}{RETURN}")
        elif answer.content:
            messages.append(f"{CHANNEL}commentary{MESSAGE}{answer.content}{END}")
        messages += [self._begin(call.name) + call.arguments + CALL for call in answer.calls]
        return f"{START}assistant".join(messages)

    def _begin(self, name: str) -> str:
        return f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}"

    def thinking(self, template: str, prompt: str) -> Thinking:
        return Thinking.MAY

    def read(self, scan: Scanner, functions: Functions, begun: bool) -> Reading[None]:
        while (yield from scan.say(Content, START, CHANNEL)) is not None:
            header, end = yield from scan.until(MESSAGE, END, CALL, RETURN, "\n")
            found = HEADER.fullmatch(header)
            if end != MESSAGE or found is None:
                yield from scan.back()
                continue
            scan.trim()
            recipient = found["late"] or found["early"]
            if recipient and functions:
                yield CallStart(recipient.removeprefix("functions."))
                yield from scan.space()
                if (yield from scan.peek()) == "{":
                    yield from scan.arguments()
            kind = Reasoning if found["channel"] == "analysis" else Arguments if recipient and functions else Content
            if (yield from scan.say(kind, END, CALL, RETURN, START)) == START:
                scan.place -= len(START)
            scan.trim()

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        yield from self.read(scan, functions, False)

    def lead(self, thinking: Thinking, budget: int | None, spell: Spell, called: bool) -> str:
        begin, end = spell(f"{CHANNEL}analysis{MESSAGE}"), spell(END)
        opening = "" if called else spell(f"{CHANNEL}final{MESSAGE}")
        return lead(begin, end, budget, True, spell(f"{START}assistant"), opening)

    def free(self, thinking: Thinking, spell: Spell) -> str:
        raise UsageError("the model's thoughts are limited by reasoning_effort, not by tokens")

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [f"{spell(self._begin(each.name))} {arguments_rule(each)}" for each in functions.values()]
        return calls_grammar(calls, False)

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        call = Call("get_weather", '{"city": "Köln"}')
        text = (
            "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant<|channel|>commentary<|message|>"
            "Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
            '<|message|>{"city": "Köln"}<|call|>'
        )
        return Answer("Let me see.", (call,), "Which city?"), text
