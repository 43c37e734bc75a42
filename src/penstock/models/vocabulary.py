"""What each token of a tokenizer adds to a text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

#: A token that stands for one byte, where a tokenizer falls back to bytes.
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """The tokens of ``tokenizer``, each as the bytes that it adds to a text: those of " def" for Llama 2's ``▁def``,
    those of a part of a character where the token is no more than that.

    Tokenizers decode lists of tokens: the first of a list may lose its space, and several bytes become one character.
    So a token is decoded behind another one, and what that gives beyond the other is what the token says.

    Attributes:
        tokenizer: whose tokens they are.
        byte_level: whether each token is a string of bytes, and a text is all of them in a row (GPT-2, Llama 3, Qwen).
        local: whether else a token's text is the same whatever follows it, runs of single bytes apart (Llama 2,
            Mistral, T5, BERT; not the end-of-word marks of GPT-1, which the last token loses).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoders = _decoders(tokenizer)
        kinds = [decoder["type"] for decoder in decoders]
        self.byte_level = "ByteLevel" in kinds and {*kinds} <= {"ByteLevel", "Fuse"}
        self.local = not _looks_ahead(decoders)
        self._falls_back = "ByteFallback" in kinds
        self._known: dict[int, bytes | None] = {}
        self._names: dict[int, bytes] = {}
        self._context: list[int] | None = None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out."""
        text: str = self.tokenizer.decode(list(tokens))
        return text

    def says(self, token: int) -> bytes | None:
        """The bytes that ``token`` adds to a text; None where it is left out: it is special, or there is none."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def byte(self, token: int) -> int | None:
        """The byte that ``token`` stands for, where the tokenizer falls back to bytes and this is one of them."""
        found = BYTE.fullmatch(self.tokenizer.id_to_token(token) or "") if self._falls_back else None
        return None if found is None else int(found[1], 16)

    def name(self, token: int) -> bytes:
        """What ``token`` is called where it stands alone: as it :meth:`says`, and a special one as it is written."""
        if token not in self._names:
            said = self.says(token)
            self._names[token] = (self.tokenizer.id_to_token(token) or "").encode() if said is None else said
        return self._names[token]

    def behind(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that ``tokens`` add to that of ``before``."""
        return self.decode([*before, *tokens])[len(self.decode(before)) :]

    @property
    def context(self) -> list[int]:
        """Tokens with a text, behind which others can be decoded; their last is no byte."""
        if self._context is None:
            letter = self.tokenizer.encode("a", add_special_tokens=False).ids
            others = ([token] for token in range(self.tokenizer.get_vocab_size()))
            self._context = next(filter(self._has_text, [letter, *others]), [])
        return self._context

    def _has_text(self, tokens: list[int]) -> bool:
        return bool(tokens) and self.byte(tokens[-1]) is None and bool(self.decode(tokens))

    def _read(self, token: int) -> bytes | None:
        written = self.tokenizer.id_to_token(token)
        if written is None or (not self.decode([token]) and self.tokenizer.decode([token], skip_special_tokens=False)):
            return None
        if self.byte_level:
            return _from_letters(written)
        byte = self.byte(token)
        return bytes([byte]) if byte is not None else self.behind(self.context, [token]).encode()


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Types and options of what ``tokenizer`` decodes with, in order."""
    if tokenizer.decoder is None:
        return []
    whole = json.loads(tokenizer.decoder.__getstate__())
    todo, found = [whole], []
    while todo:
        first = todo.pop(0)
        if first["type"] == "Sequence":
            todo = first["decoders"] + todo
        else:
            found.append(first)
    return found


def _looks_ahead(decoders: list[dict[str, Any]]) -> bool:
    """Whether a token's text may depend on tokens behind it."""
    fused = False
    for decoder in decoders:
        kind = decoder["type"]
        fused = fused or kind == "Fuse"
        if kind in ("BPEDecoder", "CTC", "ByteLevel") or (fused and (kind == "Replace" or decoder.get("stop"))):
            return True
    return False


def _letters() -> dict[str, int]:
    """The byte of each letter that GPT-2 writes bytes with: printable ones as themselves, the others, in order, as
    letters from 256 on."""
    alphabet = sorted(ByteLevel.alphabet(), key=ord)
    own = [ord(letter) for letter in alphabet if ord(letter) < 256]
    return dict(zip(alphabet, own + [byte for byte in range(256) if byte not in own], strict=True))


LETTERS = _letters()


def _from_letters(written: str) -> bytes:
    """The bytes of a token; one with another letter is text as it stands."""
    if all(letter in LETTERS for letter in written):
        return bytes(LETTERS[letter] for letter in written)
    return written.encode()
