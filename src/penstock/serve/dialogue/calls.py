"""Calls written as JSON objects: ``{"name": ..., "arguments": {...}}``."""

from __future__ import annotations

from collections.abc import Container

from penstock.core.strict_json import as_json
from penstock.serve.dialogue.answer import Arguments, Call, CallStart, Function, parsed_text
from penstock.serve.dialogue.contract import Spell
from penstock.serve.dialogue.lark import arguments_rule
from penstock.serve.dialogue.scanner import Reading, Scanner

#: What the name and the arguments are called.
NAMES = ("name", "tool_name")
ARGUMENTS = ("arguments", "parameters")

#: Its place among the calls of an answer, which is no id: it begins anew with each answer.
NUMBER = "tool_call_id"


def json_call(scan: Scanner, known: Container[str] | None = None) -> Reading[bool]:
    """Reads a call; whether there is one, of a function that is ``known``. Where there is none, nothing is told or
    read. What of the object comes behind the arguments, and is no part of a call, is not read."""
    begin = behind = scan.place
    name = id = early = None
    told = whole = False
    more = yield from scan.take("{")
    while more:
        yield from scan.space()
        key = yield from scan.string()
        yield from scan.space()
        if key is None or not (yield from scan.take(":")):
            break
        yield from scan.space()
        if key in ARGUMENTS and name is not None and not told and early is None:
            yield CallStart(name, id)
            yield from scan.arguments()
            told = True
        else:
            value = yield from scan.value()
            if value is None:
                break
            if key in NAMES and name is None:
                name = parsed_text(value)
                if not name or (known is not None and name not in known):
                    break
            elif key in ARGUMENTS and early is None and not told:
                early = value
            elif key == "id":
                id = parsed_text(value)
            elif key != "type" and not (key == NUMBER and value.strip('"').isdecimal()):
                break
        behind = scan.place
        yield from scan.space()
        whole = yield from scan.take("}")
        more = not whole and (yield from scan.take(","))
    if not told and whole and name is not None:
        yield CallStart(name, id)
        yield Arguments("{}" if early in (None, "null") else early)
    elif not whole:
        scan.place = behind if told else begin
    return told or (whole and name is not None)


def json_row(scan: Scanner, known: Container[str] | None = None) -> Reading[bool]:
    """Reads a list of calls behind its bracket, as far as it is one; whether there is any call. See
    :func:`json_call`."""
    found = False
    start = scan.place
    while True:
        yield from scan.space()
        if not (yield from json_call(scan, known)):
            scan.place = start
            return found
        found = True
        start = scan.place
        yield from scan.space()
        if (yield from scan.take("]")):
            return True
        if not (yield from scan.take(",")):
            scan.place = start
            return True


def written(call: Call, arguments: str = "arguments") -> str:
    """The text of ``call``."""
    return f'{{"name": {as_json(call.name)}, "{arguments}": {call.arguments}}}'


def call_rule(
    function: Function, spell: Spell, before: str = "", behind: str = "", arguments: str = "arguments"
) -> str:
    """Terminals for a call of ``function``, between two texts."""
    start = f'{before}{{"name": {as_json(function.name)}, "{arguments}": '
    return f"{spell(start)} {arguments_rule(function)} {spell('}' + behind)}"
