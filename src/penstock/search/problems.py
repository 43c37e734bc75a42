"""What is known of a problem, as a user wrote it: read, or refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from penstock.core.errors import UsageError
from penstock.core.files import read_text


def read_problems(
    path: Path, check: Callable[[Mapping[str, Any]], None] = lambda problem: None
) -> list[dict[str, Any]]:
    """The problems of a JSONL file, an object a line. ``check`` raises a UsageError of one that a program cannot read.

    Raises:
        UsageError: a line is no object, has no prompt that can be read, or is refused; the message names the line.
    """
    problems = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(problem, dict) or not {"prompt", "messages", "prompt_token_ids"} & problem.keys():
            raise UsageError(
                f"{path}:{number} has no prompt", hint='Each line is an object, such as {"id": "a", "prompt": "..."}.'
            )
        try:
            check_prompt(problem)
            check(problem)
        except UsageError as error:
            raise UsageError(f"{path}:{number}: {error}", hint=error.hint) from error
        problems.append(problem)
    if not problems:
        raise UsageError(f"{path} has no problems")
    return problems


def check_prompt(problem: Mapping[str, Any]) -> None:
    """Refuses a problem whose prompt is of another kind than it can be.

    Raises:
        UsageError: it is.
    """
    if not isinstance(problem.get("prompt", ""), str | list):
        raise UsageError("'prompt' is no text")
    if "messages" in problem:
        messages = tables(problem, "messages", ("role",))
        if not messages:
            raise UsageError("'messages' is empty", hint='It is a list, such as [{"role": "user", "content": "..."}].')


def texts(problem: Mapping[str, Any], name: str) -> list[str]:
    """The problem's list of texts of that ``name``; empty where it has none.

    Raises:
        UsageError: it is no such list.
    """
    found = problem.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UsageError(f"{name!r} is no list of texts", hint=f'Write "{name}": ["...", "..."].')
    return found


def tables(problem: Mapping[str, Any], name: str, keys: Iterable[str]) -> list[dict[str, Any]]:
    """The problem's list of tables of that ``name``, each of which has these ``keys``; empty where it has none.

    Raises:
        UsageError: it is no such list.
    """
    found = problem.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        shown = ", ".join(f'"{key}": ...' for key in keys)
        raise UsageError(f"{name!r} is no list of objects", hint=f'Write "{name}": [{{{shown}}}].')
    for place, each in enumerate(found):
        lacking = [key for key in keys if key not in each]
        if lacking:
            raise UsageError(f"{name}[{place}] has no {lacking[0]!r}")
    return found
