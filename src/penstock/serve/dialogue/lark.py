"""Pieces of grammars in Lark's notation, for calls of functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from penstock.core.errors import UsageError
from penstock.serve.choose.grammar import WHITESPACE, schema_fault
from penstock.serve.dialogue.answer import Function, Functions


def literal(text: str) -> str:
    """``text`` as a terminal."""
    return json.dumps(text, ensure_ascii=False)


def speller(markers: Iterable[str], token: Callable[[str], int | None]) -> Callable[[str], str]:
    """Writes a text as terminals; those of ``markers`` for which there is a ``token`` as such."""
    known = {marker: id for marker in markers if (id := token(marker)) is not None}
    if not known:
        return literal
    pattern = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))

    def spell(text: str) -> str:
        parts, place = [], 0
        for found in pattern.finditer(text):
            if text[place : found.start()]:
                parts.append(literal(text[place : found.start()]))
            parts.append(f"<[{known[found[0]]}]>")
            place = found.end()
        if text[place:]:
            parts.append(literal(text[place:]))
        return " ".join(parts) or '""'

    return spell


def json_rule(schema: Mapping[str, Any]) -> str:
    """A terminal for JSON that fits ``schema``."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def arguments_rule(function: Function) -> str:
    """A terminal for the arguments of ``function`` as a JSON object. Properties that the schema does not name are left
    out, where it does not say that they may be there."""
    return json_rule(_arguments(function))


def _arguments(function: Function) -> dict[str, Any]:
    schema = dict(function.parameters)
    schema.setdefault("type", "object")
    if "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def check_functions(functions: Functions) -> None:
    """Raises:
    UsageError: no grammar can hold a call of one of ``functions`` to its schema; the message names it, and why.
    """
    for name, function in functions.items():
        fault = schema_fault(json.dumps(_arguments(function)))
        if fault is not None:
            raise UsageError(
                f"a call of the function {name!r} cannot be held to its parameters: {fault}",
                hint="Change the schema, or let the model choose, by tool_choice auto.",
            )


def calls_grammar(calls: Sequence[str], several: bool, begin: str = "", between: str = "", end: str = "") -> str:
    """The grammar of one of ``calls``, or of several with ``between`` in between; ``begin`` and ``end`` stand around
    all of them. The arguments are terminals in a row."""
    repeated = f"(({between} call)*)" if several else ""
    rules = "".join(f"call_{place}: {call}\n" for place, call in enumerate(calls))
    choice = " | ".join(f"call_{place}" for place in range(len(calls)))
    return f"start: {begin} call {repeated} {end}\ncall: {choice}\n{rules}"
