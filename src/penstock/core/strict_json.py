"""JSON that any reader takes: texts that every encoding can carry, and no numbers but JSON's own."""

from __future__ import annotations

import json
from typing import Any


def as_json(value: Any) -> str:
    """``value`` as JSON that any encoding can carry, other letters than ASCII's as they are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if is_text(text) else json.dumps(value, allow_nan=False)


def is_text(text: str) -> bool:
    """Whether any encoding can carry ``text``: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parsed(text: str) -> Any:
    """What the JSON ``text`` stands for.

    Raises:
        ValueError: it is no JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
