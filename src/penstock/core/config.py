"""Typed configuration: a pydantic model, filled from a TOML file and ``--set a.b=c`` overrides.

Unknown keys are errors that name the nearest valid key. A value on the command line is read as TOML, and as a plain
string where it is not TOML, so ``--set optim.lr=3e-4`` and ``--set data.corpus=stdlib`` both do what they say; so does
a list of names without quotes, ``--set 'pipeline.transforms=[2bp]'``.
"""

from __future__ import annotations

import re
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from penstock.core.errors import ConfigError, UsageError, nearest
from penstock.core.faults import Place, faults


class Config(BaseModel):
    """Base of all configuration sections: unknown keys and infinite numbers are refused, and values cannot change after
    loading. The word ``none`` unsets a key that may be unset, in a file and on the command line: TOML has no null."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _unset(cls, tree: Any) -> Any:
        return unset(cls, tree)


def unset(cls: type[BaseModel], tree: Any) -> Any:
    """``tree`` with None for the word ``none``, at the keys of ``cls`` that may be None."""
    if not isinstance(tree, Mapping) or not any(isinstance(value, str) and value == "none" for value in tree.values()):
        return tree  # most are: a server makes configurations by the request
    optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
    return {key: None if value == "none" and key in optional else value for key, value in tree.items()}


C = TypeVar("C", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file; errors name the file and line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


#: ``[2bp, pipeoffload]``.
_NAMES = re.compile(r"\s*\[(\s*[\w-]+\s*(?:,\s*[\w-]+\s*)*)\]\s*")


def parse_value(text: str) -> Any:
    """The value of an override: TOML if it is that, else a list of names if it looks like one, else the text itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        names = _NAMES.fullmatch(text)
        return [name.strip() for name in names[1].split(",")] if names else text
    # A line break in the text could start a second key: then it was no value.
    return table["value"] if list(table) == ["value"] else text


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``tree`` with every ``a.b=c`` of ``overrides`` set; ``tree`` itself is left alone.

    Of two overrides of one key the later wins; else their order does not matter, since whole sections are set before
    their keys, and ``name`` before its neighbours. Where a table names a policy in short form
    (``schedule = "cosine"``), an option set below it turns the short form into a table with that name. Setting
    another ``name`` in such a table drops the options that it had in ``tree``.
    """
    result = _copy(tree)
    for path, text in sorted(map(path_of, overrides), key=lambda pair: (len(pair[0]), pair[0][-1] != "name")):
        node = result
        for part in path[:-1]:
            below = node.setdefault(part, {})
            if isinstance(below, str):
                below = node[part] = {"name": below}
            if not isinstance(below, dict):
                raise ConfigError(f"cannot set {'.'.join(path)!r}: {part!r} is a value, not a section")
            node = below
        value = parse_value(text)
        if path[-1] == "name" and node.get("name", value) != value:
            node.clear()
        node[path[-1]] = value
    return result


def overridden(source: str, overrides: Sequence[str]) -> str:
    """What to call a configuration of ``source`` with ``overrides``, in an error."""
    return f"{source} with {' '.join(f'--set {each}' for each in overrides)}" if overrides else source


def path_of(override: str) -> tuple[list[str], str]:
    """The path and the text of an override ``a.b=c``.

    Raises:
        UsageError: it is not of that form.
    """
    key, separator, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise UsageError(
            f"cannot read the override {override!r}",
            hint="Write key=value, or section.key=value.",
        )
    return path, text


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def build(cls: type[C], tree: Mapping[str, Any], source: str = "the configuration") -> C:
    """Validates ``tree`` as a ``cls``.

    Raises:
        ConfigError: every fault found, one a line, each with its key; unknown keys with the nearest valid name.
    """
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_explain(cls, place, fault) for place, fault in faults(error.errors(), tree)]
        raise ConfigError(f"{source}: not valid:\n  " + "\n  ".join(lines)) from error


#: How a value at fault is shown: a large or deep one in part.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def _explain(cls: type[BaseModel], place: Place, fault: Any) -> str:
    keys = [str(part) for part in place]
    where = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key; {nearest(keys[-1], _fields_at(cls, keys[:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: required, but not given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "byte_size":
        message = "give a number of bytes, such as 500MB or 8GB"
    return f"{where}: {message} (got {_SHORT.repr(fault['input'])})" if where else message


def _fields_at(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that are valid at ``path``; parts of it that are no field (an index, the tag of a union) are passed."""
    models = [cls]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [inner for field in fields for inner in _models_in(field.annotation)] if fields else models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type is made of: itself, or those of its union or container."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
