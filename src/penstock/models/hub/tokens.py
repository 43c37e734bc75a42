"""The tokenizer beside a model, and the tokens that end its texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.errors import DataError, ModelError
from penstock.core.files import read_json
from penstock.models.companions import GENERATION
from penstock.models.hub.folders import CONFIG, resolve
from penstock.models.hub.multimodal import text_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

#: Classes of transformers, under its names of today and of before, that do what tokenizer.json says and nothing else.
GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")


def end_tokens(source: str | Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a text of the model ``source``: the tokenizer's own, and those that config.json and
    generation_config.json name, such as the end of a chat's turn.

    Raises:
        UsageError: there is no such model.
        PenstockError: one of the files is damaged.
    """
    return frozenset({tokenizer.eos_token_id, *config_end_tokens(resolve(source))} - {None})


def config_end_tokens(folder: Path) -> set[int]:
    """Those of a folder's tokens that config.json and generation_config.json name as ends of a text.

    Raises:
        PenstockError: one of the files is damaged, or names what is no token.
    """
    found: set[int] = set()
    for path in (folder / CONFIG, folder / GENERATION):
        stored = read_json(path) if path.is_file() else {}
        named = text_part(stored).get("eos_token_id") if isinstance(stored, dict) else None
        tokens = [] if named is None else named if isinstance(named, list) else [named]
        if not all(type(token) is int for token in tokens):
            raise ModelError(f"{path}: the eos_token_id {named!r} is no token, nor several")
        found.update(tokens)
    return found


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; ``source`` as in :func:`resolve`.

    Raises:
        UsageError: there is no such model.
        DataError: it has no tokenizer, or a damaged one.
    """
    folder = resolve(source)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise DataError(f"{folder} has no tokenizer", hint=f"It needs one of {', '.join(TOKENIZERS)}.")
    try:
        if _is_general(folder):
            # To find out a class, transformers would load all that it knows of models, and what that asks for.
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Depending on the file at fault, nearly any: ValueError, KeyError, the Rust side's own.
        raise DataError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _is_general(folder: Path) -> bool:
    """Whether the tokenizer of ``folder`` is all in its tokenizer.json."""
    path = folder / "tokenizer_config.json"
    told = read_json(path) if path.is_file() else None
    known = isinstance(told, dict) and told.get("tokenizer_class") in GENERAL and "auto_map" not in told
    return known and (folder / "tokenizer.json").is_file()
