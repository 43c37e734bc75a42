"""What a model answers in a chat: thoughts, words and calls of functions, whole and in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from penstock.core.errors import UsageError
from penstock.core.strict_json import is_text, parsed

#: The schema of a function that takes nothing.
NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Attributes:
        name: of the function.
        description: what it does, for the model.
        parameters: the JSON schema of its arguments, an object.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NOTHING)

    def kinds(self, parameter: str) -> frozenset[str]:
        """The JSON types that a parameter may have, as far as the schema names them."""
        declared = self.parameters.get("properties")
        return _kinds(declared.get(parameter)) if isinstance(declared, Mapping) else frozenset()


def _kinds(schema: Any) -> frozenset[str]:
    if not isinstance(schema, Mapping):
        return frozenset()
    kind, others = schema.get("type"), schema.get("anyOf") or schema.get("oneOf")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, Sequence):
        return frozenset(str(each) for each in kind)
    return frozenset().union(*map(_kinds, others)) if isinstance(others, Sequence) else frozenset()


Functions = Mapping[str, Function]


def functions_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Function]:
    """The functions in OpenAI's list of ``tools``, by name.

    Raises:
        UsageError: a tool is no function, or two have one name.
    """
    found: dict[str, Function] = {}
    for place, tool in enumerate(tools or ()):
        told = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(told, Mapping):
            raise UsageError(f"tool {place + 1} is no function, and only functions can be called here")
        name, parameters = told.get("name"), told.get("parameters")
        if not isinstance(name, str) or not name:
            raise UsageError(f"tool {place + 1} has no name")
        if name in found:
            raise UsageError(f"two tools are called {name!r}")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise UsageError(f"the parameters of the function {name!r} are no JSON schema")
        found[name] = Function(name, str(told.get("description") or ""), parameters or NOTHING)
    return found


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the function ``name`` with ``arguments``, the text of a JSON object. ``id`` is the model's own word for
    the call, where it gave one."""

    name: str
    arguments: str = "{}"
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer."""

    content: str = ""
    calls: tuple[Call, ...] = ()
    reasoning: str = ""


@dataclasses.dataclass(frozen=True)
class Content:
    """More of what the model says."""

    text: str


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """More of what it thinks."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
    """It calls a function; the arguments follow."""

    name: str
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Arguments:
    """More of the text of the arguments of the newest call."""

    text: str


Event = Content | Reasoning | CallStart | Arguments


def gathered(events: Iterable[Event]) -> Answer:
    """The answer that ``events`` add up to."""
    content, reasoning = [], []
    calls: list[tuple[CallStart, list[str]]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart():
                calls.append((event, []))
            case Arguments(text):
                calls[-1][1].append(text)
    made = tuple(Call(start.name, "".join(parts), start.id) for start, parts in calls)
    return Answer("".join(content), made, "".join(reasoning))


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events, those of one kind that follow each other as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        match last, event:
            case (Content(one), Content(two)):
                found[-1] = Content(one + two)
            case (Reasoning(one), Reasoning(two)):
                found[-1] = Reasoning(one + two)
            case (Arguments(one), Arguments(two)):
                found[-1] = Arguments(one + two)
            case _:
                found.append(event)
    return found


def parsed_text(text: str) -> str | None:
    """The string that the JSON ``text`` stands for; None where it is none, or no characters."""
    try:
        value = parsed(text)
    except ValueError:
        return None
    return value if isinstance(value, str) and is_text(value) else None
