"""Byte-level BPE tokenizers that suit code at small vocabularies."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.core.errors import DataError, UsageError
from penstock.core.files import read_json, write_atomic, write_json
from penstock.data.pieces import parts

END_OF_TEXT = "<|endoftext|>"

#: In place of a special token's name: the one that the tokenizer itself would take.
AUTO = "auto"

#: How text is cut before merging, first match first; a token never crosses a cut. Beside GPT-2's rule, an indented
#: new line is one piece (any whitespace with a line break in it), and numbers come in pieces of three digits at most.
PIECES = "|".join(
    (
        r"\s*[\r\n]\s*",
        r" ?[\p{L}\p{M}]+",
        r" ?\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

#: Bytes of text that merges are learnt from. More changes little and costs time.
SAMPLE_BYTES = 64 << 20


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learns a byte-level BPE tokenizer. It encodes any text and decodes it exactly.

    Token 0 is the special ``<|endoftext|>``, 1 to 256 are the bytes. Where the texts allow fewer than ``vocabulary``
    tokens, the tokenizer has fewer. Of more than 64 MiB of texts, a sample is used, chosen by content and thus
    independent of their order.

    Raises:
        UsageError: the vocabulary has no room for the bytes and ``<|endoftext|>``.
        DataError: there is no text.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary <= len(alphabet):
        raise UsageError(f"a vocabulary of {vocabulary} is too small: bytes and end of text are {len(alphabet) + 1}")
    chosen = sample(texts, SAMPLE_BYTES)
    if not any(chosen):
        raise DataError("there is no text to learn a tokenizer from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((part for text in chosen for part in parts(text)), trainer)
    return tokenizer


def sample(texts: Iterable[str], limit: int) -> list[str]:
    """The texts with the smallest content hashes, as many as fit in ``limit`` UTF-8 bytes, but at least one.

    Holds no more than that and one text at a time, and does not depend on the order of ``texts``.
    """
    kept: list[tuple[int, str]] = []  # a heap, the largest hash first
    total, ceiling = 0, 1 << 64
    for text in texts:
        payload = text.encode()
        key = int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little")
        if key >= ceiling:
            continue
        heapq.heappush(kept, (-key, text))
        total += len(payload)
        while total > limit and len(kept) > 1:
            largest, dropped = heapq.heappop(kept)
            total -= len(dropped.encode())
            ceiling = -largest
    return [text for _, text in sorted(kept)]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, end_of_text: str = END_OF_TEXT) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` reads."""
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads the ``tokenizer.json`` in ``folder``.

    Raises:
        DataError: it is missing, or not a tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"there is no tokenizer.json in {folder}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} is not a tokenizer: {error}") from error


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Adds special ``tokens``, in place, behind those that are there; one that is there already stays what it is."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def with_tokens(folder: Path, tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer in ``folder``, as of :func:`load_tokenizer`, with special ``tokens`` added."""
    tokenizer = load_tokenizer(folder)
    add_tokens(tokenizer, tokens)
    return tokenizer


def size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest token id."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


@dataclasses.dataclass(frozen=True)
class Around:
    """The special tokens before and after each document, by name and by id. ``begin_of_text`` is empty, or several
    names in a row, where the tokenizer puts none or several there."""

    begin_of_text: str
    beginning: tuple[int, ...]
    end_of_text: str
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, begin_of_text: str = AUTO, end_of_text: str = END_OF_TEXT) -> Around:
        """Those called so. :data:`AUTO` at the beginning is what the tokenizer itself puts before a text, and an empty
        name is nothing.

        Raises:
            UsageError: the tokenizer has no such token.
        """
        if begin_of_text == AUTO:
            begins = beginning(tokenizer)
        else:
            begins = (_id(tokenizer, begin_of_text, "begin"),) if begin_of_text else ()
        names = "".join(str(tokenizer.id_to_token(token)) for token in begins)
        return cls(names, begins, end_of_text, _id(tokenizer, end_of_text, "end"))


def _id(tokenizer: Tokenizer, token: str, place: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise UsageError(f"the tokenizer has no token {token!r} to mark the {place} of a document")
    return found


def declared(folder: Path, token: str) -> str | None:
    """The special token, such as ``eos_token``, that the files of the tokenizer in ``folder`` name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        found = stored.get(token) if isinstance(stored, dict) else None
        text = found.get("content") if isinstance(found, dict) else found
        if isinstance(text, str):
            return text
    return None


def beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before a text by itself: BOS for Llama, nothing for GPT-2 and Qwen."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(starts, 0)])


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash, in hex, of what decides the tokens of a text; padding, truncation and decoding do not count."""
    whole = json.loads(tokenizer.to_str())
    deciding = [whole[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
    return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=32).hexdigest()
