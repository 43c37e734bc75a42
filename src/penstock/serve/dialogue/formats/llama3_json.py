"""Llama 3: bare JSON."""

from __future__ import annotations

from typing import ClassVar

from penstock.policy import policy
from penstock.serve.dialogue.answer import Answer, Call, Content, Functions
from penstock.serve.dialogue.calls import call_rule, json_call, written
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar
from penstock.serve.dialogue.scanner import Reading, Scanner

TAG = "<|python_tag|>"


@policy("serve.dialogue", "llama3_json")
class Llama3Json(Dialogue):
    """Llama 3.1 to 3.3: an answer that begins with ``{"name": ..., "parameters": ...}``, or goes on so behind
    ``<|python_tag|>``, is a call, if there is such a function; further ones follow behind semicolons. Any other JSON is
    content."""

    signs: ClassVar[tuple[str, ...]] = ("<|start_header_id|>", '"parameters": ')
    markers: ClassVar[tuple[str, ...]] = (TAG,)

    def write(self, answer: Answer) -> str:
        calls = "; ".join(written(call, "parameters") for call in answer.calls)
        before = answer.content + TAG if answer.content and calls else answer.content
        return self.thought(answer.reasoning) + before + calls

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        start = scan.place
        yield from scan.space()
        if not (yield from self._row(scan, functions)):
            scan.place = start
        while (yield from scan.say(Content, TAG)) is not None:
            if not (yield from self._row(scan, functions)):
                yield from scan.back()

    def _row(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        """Reads calls, of which further ones follow behind semicolons; whether there are any."""
        yield from scan.space()
        if not (yield from json_call(scan, functions)):
            return False
        while True:
            start = scan.place
            yield from scan.space()
            another = yield from scan.take(";")
            yield from scan.space()
            if not another or not (yield from json_call(scan, functions)):
                scan.place = start
                scan.trim()
                return True

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [call_rule(each, spell, arguments="parameters") for each in functions.values()]
        return calls_grammar(calls, several, between=spell("; "))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln"}'), Call("now"))
        text = '{"name": "get_weather", "parameters": {"city": "Köln"}}; {"name": "now", "parameters": {}}'
        return Answer(calls=calls), text
