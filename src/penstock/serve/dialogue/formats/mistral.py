"""Mistral's first models with calls: a list of JSON objects."""

from __future__ import annotations

import re
import secrets
import string
from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, CallStart, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_row, written
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

CALLS, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

#: The id of a call.
WORD = re.compile(r"[\w-]{0,64}")


@policy("serve.dialogue", "mistral")
class Mistral(Dialogue):
    """Mistral 7B v0.3, Nemo, Small and Large: ``[TOOL_CALLS]`` and a list of JSON objects. What newer ones write,
    ``[TOOL_CALLS]NAME[ARGS]{...}`` for each call, is read too. Calls have ids of nine letters and digits, as their
    templates want them."""

    signs: ClassVar[tuple[str, ...]] = (CALLS,)
    markers: ClassVar[tuple[str, ...]] = (CALLS, ID, ARGUMENTS, "[THINK]", "[/THINK]")
    tags: ClassVar[tuple[str, str]] = ("[THINK]", "[/THINK]")

    def write(self, answer: Answer) -> str:
        row = f"{CALLS} [{', '.join(map(written, answer.calls))}]" if answer.calls else ""
        return self.thought(answer.reasoning) + answer.content + row

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        while (yield from scan.say(Content, CALLS)) is not None:
            yield from scan.space()
            row = yield from scan.take("[")
            if (yield from json_row(scan) if row else self._named(scan)):
                scan.trim()
            else:
                yield from scan.back()

    def _named(self, scan: Scanner) -> Reading[bool]:
        """Reads the name of a function and its arguments; whether they are there."""
        name = yield from scan.name()
        id = None
        if (yield from scan.take(ID)):
            id = yield from scan.match(WORD)
        end = yield from scan.take(ARGUMENTS)
        yield from scan.space()
        start = scan.place
        if not name or not (end or id is None) or not (yield from scan.take("{")):
            return False
        scan.place = start
        yield CallStart(name, id)
        yield from scan.arguments()
        return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [call_rule(each, spell) for each in functions.values()]
        return calls_grammar(calls, several, spell(f"{CALLS} ["), spell(", "), spell("]"))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = (
            'Let me see.[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln"}}, '
            '{"name": "now", "arguments": {}}]'
        )
        return Answer("Let me see.", calls), text

    def new_id(self) -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
