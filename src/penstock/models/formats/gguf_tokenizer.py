"""The tokenizer of a GGUF file, as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from penstock.core.errors import DataError

#: How texts are split before their bytes are joined, by llama.cpp's names: as transformers does.
SPLITS = (
    *(
        "default",
        "gpt-2",
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "qwen2",
        "deepseek-r1-qwen",
        "tekken",
        "gpt-4o",
    ),
    *("llama4", "dbrx", "smaug-bpe", "pixtral", "minimax-m2", "qwen35", "olmo", "mpt", "phi-2", "jais", "megrez"),
)

#: And with every digit alone.
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")

#: Special tokens, and the keys of the metadata that say which they are.
SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def save_tokenizer(file: Path, metadata: Callable[[str], Any], context: int, folder: Path) -> None:
    """Writes the tokenizer of ``file`` and its chat template, whose ``metadata`` are given by key, into ``folder``. The
    model was made for texts of up to ``context`` tokens.

    transformers makes it. Where every digit is a piece of its own, that is added, which transformers does not know of.

    Raises:
        DataError: there is none, or it is of a kind that is not supported.
    """
    kind, split = metadata("tokenizer.ggml.model"), metadata("tokenizer.ggml.pre") or "default"
    if kind is None:
        raise DataError(f"{file} has no tokenizer", hint="A GGUF file of another maker may have one.")
    if kind == "gpt2" and split not in (*SPLITS, *DIGITS):
        raise DataError(
            f"the tokenizer in {file} splits texts in the manner of {split!r}, which is not supported",
            hint="The model's Hugging Face folder has a tokenizer.json, which is read as it is.",
        )
    from transformers import PreTrainedTokenizerFast

    try:
        made = PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # As for folders: nearly anything, depending on what is wrong.
        raise DataError(f"the tokenizer in {file} cannot be read: {error}") from error
    backend, tokens = made.backend_tokenizer, metadata("tokenizer.ggml.tokens")
    if kind == "gpt2" and split in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    named = {name: metadata(f"tokenizer.ggml.{key}") for name, key in SPECIAL.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_without_tokens_from(backend, len(tokens)),
        chat_template=made.chat_template,
        model_max_length=context,
        **{name: tokens[token] for name, token in named.items() if token is not None},
    )
    tokenizer.save_pretrained(folder)


def _without_tokens_from(backend: Tokenizer, count: int) -> Tokenizer:
    """The tokenizer without added tokens from ``count`` on: those that transformers' class for the kind of tokenizer
    takes to be in every vocabulary, and of which the model knows nothing."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(state))
