"""What lies beside a model's weights and is no part of them: tokenizer, chat template, defaults of generation.

A model that was trained further is used like the one that it was trained from, so these files go along unchanged: the
special tokens, ``model_max_length``, the chat template (a file of its own or a key of ``tokenizer_config.json``), and
``generation_config.json`` with its end tokens and sampling defaults.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from penstock.core.files import explain_os_errors, read_json, write_json

GENERATION = "generation_config.json"
PATTERNS = (
    "tokenizer*.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    GENERATION,
)


def companions(folder: Path) -> Iterator[Path]:
    """The files of a Hugging Face folder that lie beside its weights, by their names in it."""
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}):
        yield path.relative_to(folder)


def copy_companions(source: Path, target: Path) -> None:
    """Copies them from one folder into another.

    Raises:
        PenstockError: a file cannot be read or written.
    """
    with explain_os_errors(f"cannot copy what lies beside the model from {source} to {target}"):
        for name in companions(source):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def end_with(folder: Path, token: int, others: Iterable[int]) -> None:
    """Makes ``token`` end a text of the model that ``folder`` lies beside, next to the ``others`` that do already."""
    path = folder / GENERATION
    stored: dict[str, Any] = read_json(path) if path.is_file() else {}
    named = stored.get("eos_token_id")
    known = {*others, *(named if isinstance(named, list) else [named])} - {None}
    if token not in known:
        write_json(path, stored | {"eos_token_id": sorted({*known, token})})
