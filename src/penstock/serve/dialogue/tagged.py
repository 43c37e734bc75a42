"""Arguments written one by one between tags: strings as they are, everything else as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from penstock.core.strict_json import as_json, parsed
from penstock.serve.dialogue.answer import Arguments, Call, Function
from penstock.serve.dialogue.contract import Spell
from penstock.serve.dialogue.lark import json_rule
from penstock.serve.dialogue.scanner import Reading, Scanner

#: What some models write for JSON's words.
WORDS = {"True": True, "False": False, "None": None}

#: Keywords of a schema that forbid nothing.
ANNOTATIONS = {"type", "title", "description", "default", "examples"}

#: Keywords of an object whose properties can be written one by one.
OBJECT = ANNOTATIONS | {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}


@dataclasses.dataclass(frozen=True)
class Tags:
    """What an argument stands between: ``key`` NAME ``named`` ``between`` ``value`` VALUE ``end``, with ``padding`` on
    both sides of the value; ``between`` is white space. One of ``closes`` ends the arguments."""

    key: str
    named: str
    value: str
    end: str
    closes: tuple[str, ...]
    padding: str = ""
    between: str = ""

    def opened(self, name: str) -> str:
        """What is before the value of the argument ``name``."""
        return f"{self.key}{name}{self.named}{self.between}{self.value}{self.padding}"

    def written(self, call: Call) -> list[str]:
        """The arguments of ``call``."""
        end = self.padding + self.end
        return [self.opened(name) + text_of(value) + end for name, value in parsed(call.arguments).items()]

    def read(self, scan: Scanner, function: Function | None) -> Reading[None]:
        """Passes on arguments as a JSON object, and reads over what closes them. Where something else follows, or the
        text ends, the object is not closed either."""
        opening = "{"
        while True:
            start = scan.place
            yield from scan.space()
            if not (yield from scan.take(self.key)):
                break
            name, end = yield from scan.until(self.named, "\n")
            if self.value:
                yield from scan.space()
            if end != self.named or not (yield from scan.take(self.value)):
                scan.place = start
                return
            kinds = function.kinds(name) if function is not None else frozenset()
            value = (yield from self._json(scan)) if kinds and "string" not in kinds else None
            if value is None:
                text, end = yield from scan.until(self.end)
                if end is None:
                    yield Arguments(f"{opening}{as_json(name)}: {as_json(text.removeprefix(self.padding))[:-1]}")
                    return
                value = value_of(text.removeprefix(self.padding).removesuffix(self.padding), kinds)
            yield Arguments(f"{opening}{as_json(name)}: {value}")
            opening = ", "
        if (yield from scan.take_one(*self.closes)) is None:
            scan.place = start
        else:
            yield Arguments("{}" if opening == "{" else "}")

    def _json(self, scan: Scanner) -> Reading[str | None]:
        """Reads JSON, in whose strings any tag may stand, and ``end``; None where there is no such thing here."""
        start = scan.place
        yield from scan.space()
        value = yield from scan.value()
        yield from scan.space()
        if value is not None and (yield from scan.take(self.end)) and _is_json(value):
            return value
        scan.place = start
        return None


def _is_json(text: str) -> bool:
    try:
        parsed(text)
    except ValueError:
        return False
    return True


def value_of(text: str, kinds: frozenset[str]) -> str:
    """What ``text`` stands for, as JSON, where a value may be of ``kinds``; of any, where there are none."""
    word = text.strip()
    if kinds != {"string"} and (word in WORDS or _is_json(word)):
        value = WORDS[word] if word in WORDS else parsed(word)
        if "string" not in kinds or _kind(value) in kinds - {"string"}:
            return as_json(value) if word in WORDS else word
    return as_json(text)


def text_of(value: Any) -> str:
    """The text of ``value``."""
    return value if isinstance(value, str) else as_json(value)


def _kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names[type(value)]


# Grammars


def raw_rule(spell: Spell, end: str) -> str:
    """The rule ``raw``: any text up to ``end``, and that."""
    close = spell(end)
    if close.startswith("<"):
        return f"raw: raw_text {close}\nraw_text: /(?s:.*)/\n"
    return f"raw[suffix={close}]: /(?s:.*)/\n"


def arguments_rule(function: Function, tags: Tags, spell: Spell, between: str = "") -> str | None:
    """Terminals for the arguments of ``function``, in the order of its schema, ``between`` before each; None where they
    cannot be written so that they fit it."""
    schema = function.parameters
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not OBJECT.issuperset(schema) or not set(required).issubset(properties):
        return None
    parts = []
    for name, own in properties.items():
        value = _value_rule(own, schema, tags, spell)
        if value is None or not name.isprintable() or any(each in name for each in (*"<>", tags.named)):
            return None
        whole = f"{spell(between + tags.opened(name))} {value}"
        parts.append(whole if name in required else f"({whole})?")
    return " ".join(parts)


def _value_rule(schema: Any, root: Mapping[str, Any], tags: Tags, spell: Spell) -> str | None:
    """A value, and the tag behind it."""
    if not isinstance(schema, Mapping):
        return None
    close = spell(tags.padding + tags.end)
    kinds = Function("", parameters={"properties": {"": schema}}).kinds("")
    if "string" not in kinds:
        definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return f"{json_rule({**schema, **definitions})} {close}"
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if choices is not None and ANNOTATIONS.issuperset(set(schema) - {"enum", "const"}) and kinds == {"string"}:
        plain = all(isinstance(each, str) and each.isprintable() and tags.end not in each for each in choices)
        return f"({' | '.join(spell(each) for each in choices)}) {close}" if plain and all(choices) else None
    others = schema.get("anyOf", schema.get("oneOf", []))
    free = all(ANNOTATIONS.issuperset(set(each) - {"anyOf", "oneOf"}) for each in (schema, *others))
    return "raw" if free and not kinds & {"array", "object"} else None
