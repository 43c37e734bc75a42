"""Llama 3.2 and 4: calls as Python writes them."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any, ClassVar

from penstock.core.strict_json import as_json, parsed
from penstock.policy import policy
from penstock.serve.dialogue.answer import (
    Answer,
    Arguments,
    Call,
    CallStart,
    Content,
    Function,
    Functions,
)
from penstock.serve.dialogue.calls import call_rule, json_call
from penstock.serve.dialogue.contract import Dialogue, Spell
from penstock.serve.dialogue.lark import calls_grammar, json_rule
from penstock.serve.dialogue.scanner import Reading, Scanner
from penstock.serve.dialogue.tagged import OBJECT

START, END = "<|python_start|>", "<|python_end|>"

#: JSON's words, which some models write instead of Python's.
WORDS = {"true": True, "false": False, "null": None}

#: The name of an argument.
PARAMETER = re.compile(r"[^\W\d][\w-]*")


@policy("serve.dialogue", "pythonic")
class Pythonic(Dialogue):
    """Llama 3.2 and 4, and their like: an answer that begins with ``[f(city="Köln"), g()]``, or goes on so behind
    ``<|python_start|>``, is calls, if there are such functions; all arguments are named, and literals. Any other list
    is content. Where a schema asks more than a grammar can hold this to, it writes a JSON object in the list."""

    signs: ClassVar[tuple[str, ...]] = ("func_name1(params_name1",)
    markers: ClassVar[tuple[str, ...]] = (START, END)

    def write(self, answer: Answer) -> str:
        row = f"[{', '.join(map(python_call, answer.calls))}]" if answer.calls else ""
        row = f"{START}{row}{END}" if row and answer.content else row
        return self.thought(answer.reasoning) + answer.content + row

    def calls(self, scan: Scanner, functions: Functions) -> Reading[None]:
        start = scan.place
        yield from scan.space()
        if not (yield from self._row(scan, functions)):
            scan.place = start
        while (yield from scan.say(Content, START)) is not None:
            yield from scan.space()
            if (yield from self._row(scan, functions)):
                yield from scan.space()
                yield from scan.take(END)
            else:
                yield from scan.back()

    def _row(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        """Reads a list of calls, as far as it is one; whether there is any call."""
        if not (yield from scan.take("[")):
            return False
        found = False
        while (yield from self._call(scan, functions)):
            found = True
            start = scan.place
            yield from scan.space()
            if (yield from scan.take("]")):
                scan.trim()
                return True
            if not (yield from scan.take(",")):
                scan.place = start
                break
        return found

    def _call(self, scan: Scanner, functions: Functions) -> Reading[bool]:
        start = scan.place
        yield from scan.space()
        if (yield from json_call(scan, functions)):
            return True
        name = yield from scan.name()
        if name in functions and (yield from scan.take("(")):
            arguments = yield from scan.parts()
            value = None if arguments is None else _read(arguments)
            if value is not None:
                yield CallStart(name)
                yield Arguments(value)
                return True
        scan.place = start
        return False

    def rules(self, functions: Functions, several: bool, spell: Spell) -> str:
        calls = [python_rule(each, spell) or call_rule(each, spell) for each in functions.values()]
        return calls_grammar(calls, several, spell("["), spell(", "), spell("]"))

    @classmethod
    def example(cls) -> tuple[Answer, str]:
        calls = (Call("get_weather", '{"city": "Köln", "days": 3}'), Call("now"))
        return Answer(calls=calls), '[get_weather(city="Köln", days=3), now()]'


def python_call(call: Call) -> str:
    return f"{call.name}({', '.join(f'{name}={_text(value)}' for name, value in parsed(call.arguments).items())})"


def _text(value: Any) -> str:
    """``value`` as an argument: Python's words by themselves, JSON where they are parts of something."""
    return repr(value) if value is None or isinstance(value, bool) else as_json(value)


def _read(parts: list[str]) -> str | None:
    """Arguments as a JSON object; None where one is anything but a named literal."""
    if parts and not parts[-1].strip():
        parts = parts[:-1]  # none, or a comma behind the last
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            named = {}
            for part in parts:
                name, equals, value = part.partition("=")
                if not equals or not PARAMETER.fullmatch(name.strip()):
                    return None
                named[name.strip()] = _json(value.strip())
        return "{" + ", ".join(f"{as_json(name)}: {value}" for name, value in named.items()) + "}"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _json(text: str) -> str:
    """The JSON of a literal; what is JSON already stays as it is.

    Raises:
        ValueError, SyntaxError, RecursionError, MemoryError: it is no literal.
    """
    try:
        parsed(text)
    except ValueError:
        return as_json(_literal(ast.parse(text, mode="eval").body))
    return text


def _literal(node: ast.expr) -> Any:
    """The value of a literal that JSON has too.

    Raises:
        ValueError: it is none.
    """
    match node:
        case ast.Constant(value) if value is None or isinstance(value, str | bool | int | float):
            return value
        case ast.Name(name) if name in WORDS:
            return WORDS[name]
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if isinstance(value, int | float):
            return -value
        case ast.List(items) | ast.Tuple(items):
            return [_literal(each) for each in items]
        case ast.Dict(keys, values):
            names = [None if each is None else _literal(each) for each in keys]
            if all(isinstance(each, str) for each in names):
                return {name: _literal(each) for name, each in zip(names, values, strict=True)}
    raise ValueError("this is no literal")


def python_rule(function: Function, spell: Spell) -> str | None:
    """Terminals for a call whose values are JSON, which is read here as well; None where a schema asks more than one
    value at a time can be held to, or a name cannot be written. Those that are required come first."""
    schema = function.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not OBJECT.issuperset(schema) or not set(required).issubset(properties):
        return None
    if not all(PARAMETER.fullmatch(name) for name in properties):
        return None
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    values = {
        name: f"{spell(name + '=')} ({json_rule({**own, **definitions})}{_words(function.kinds(name))})"
        for name, own in properties.items()
    }
    comma = spell(", ")
    first = f" {comma} ".join(values[name] for name in properties if name in required)
    others = [values[name] for name in properties if name not in required]
    behind = [f"({comma} {value})?" for value in others]
    if first:
        inside = " ".join([first, *behind])
    else:
        rows = [" ".join([value, *behind[place + 1 :]]) for place, value in enumerate(others)]
        inside = f"({' | '.join(rows)})?" if rows else ""
    return f"{spell(function.name + '(')} {inside} {spell(')')}"


def _words(kinds: frozenset[str]) -> str:
    """Python's words for values of ``kinds``, as further choices of a grammar."""
    if kinds == {"boolean"}:
        return ' | "True" | "False"'
    return ' | "None"' if "null" in kinds else ""
