"""Mistral's newer models: names and arguments behind markers."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Functions
from penstock.serve.dialogue.contract import Spell
from penstock.serve.dialogue.formats.mistral import ARGUMENTS, CALLS, Mistral
from penstock.serve.dialogue.lark import arguments_rule, calls_grammar


@policy("serve.dialogue", "mistral_args")
class MistralArgs(Mistral):
    """Mistral Small 3.2, Magistral, Devstral and Ministral 3: ``[TOOL_CALLS]NAME[ARGS]{...}`` for each call. What older
    ones write is read too."""

    signs: ClassVar[tuple[str, ...]] = (CALLS, ARGUMENTS)

    def write(self, answer: Answer) -> str:
        calls = [f"{CALLS}{call.name}{ARGUMENTS}{call.arguments}" for call in answer.calls]
        return self.thought(answer.reasoning) + answer.content + "".join(calls)

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [f"{spell(CALLS + each.name + ARGUMENTS)} {arguments_rule(each)}" for each in functions.values()]
        return calls_grammar(calls, several)

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        return Answer("Let me see.", calls), (
            'Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Köln"}[TOOL_CALLS]now[ARGS]{}'
        )
