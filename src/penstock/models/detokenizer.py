"""Text out of tokens that come one after another.

The law: the pieces together are what decoding all tokens at once gives beyond the text of the prompt. A character that
the prompt begins and the tokens complete belongs to the tokens.

Three kinds of tokenizers need three ways. Where tokens are strings of bytes, characters are read as their bytes come.
Where tokens are pieces of text, and single bytes stand for characters without a token, a piece is text at once; but
``tokenizers`` decodes a run of single bytes as a whole: all of it if it is UTF-8, else a replacement character for
each byte, even for those that were characters. So a run is text when it ends. The text of any other tokenizer is known
at its end.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from penstock.models.vocabulary import Vocabulary

#: What stands for bytes that are no character.
REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Reads the tokens behind a prompt."""

    @property
    def pending(self) -> str:
        """What :meth:`end` would add to the text now, unfinished characters apart; tokens to come may change it."""

    @property
    def waiting(self) -> int:
        """How many whole characters are read that are not settled yet."""

    def push(self, token: int) -> str:
        """The text that is settled with ``token``: whatever follows, it stays."""

    def end(self) -> str:
        """The rest of the text, unfinished characters included."""


def detokenizer(tokenizer: Tokenizer, prompt: Sequence[int], shown: Mapping[int, str] | None = None) -> Detokenizer:
    """Reads what ``tokenizer`` decodes behind ``prompt``; special tokens that are ``shown`` are texts of their own."""
    vocabulary = Vocabulary(tokenizer)
    kind = ByteLevel if vocabulary.byte_level else Pieces if vocabulary.local else Whole
    return Shown(kind(vocabulary, prompt), shown) if shown else kind(vocabulary, prompt)


class Shown:
    """Some special tokens, which others leave out, stand as they are written between what others read."""

    def __init__(self, others: Detokenizer, names: Mapping[int, str]) -> None:
        self._others, self._names = others, names

    @property
    def pending(self) -> str:
        return self._others.pending

    @property
    def waiting(self) -> int:
        return self._others.waiting

    def push(self, token: int) -> str:
        if token not in self._names:
            return self._others.push(token)
        return self._others.end() + self._names[token]

    def end(self) -> str:
        return self._others.end()


class ByteLevel:
    """Tokens are strings of bytes."""

    pending, waiting = "", 0  # a character that is whole is settled

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = b""
        for token in reversed(prompt):
            last = (vocabulary.says(token) or b"") + last
            if len(last) >= 3:  # an unfinished character has no more bytes
                break
        self._decoder.decode(last)
        #: The prompt's text shows its unfinished character as a replacement, or as two where it can only become half of
        #: a pair (UTF-16's); if it stays so, it is not shown again.
        self._shown = self._decoder.getstate()[0].decode(errors="replace")

    def push(self, token: int) -> str:
        return self._fresh(self._decoder.decode(self._vocabulary.says(token) or b""))

    def end(self) -> str:
        return self._fresh(self._decoder.decode(b"", final=True))

    def _fresh(self, text: str) -> str:
        if text and self._shown:
            text, self._shown = text.removeprefix(self._shown), ""
        return text


class Pieces:
    """Tokens are pieces of text, and single bytes."""

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        end = len(prompt)
        while end and (vocabulary.byte(prompt[end - 1]) is not None or vocabulary.says(prompt[end - 1]) is None):
            end -= 1
        #: All tokens before, while they have no text: what the first text looks like depends on them.
        self._head: list[int] | None = _textless(vocabulary, prompt[:end])
        self._run = _Run(vocabulary, self._head)
        # The run that the prompt ends with goes on behind it.
        for token in prompt[end:]:
            self.push(token)
        self._run.hand_over()

    @property
    def pending(self) -> str:
        return self._run.whole

    @property
    def waiting(self) -> int:
        return self._run.length

    def push(self, token: int) -> str:
        said, byte = self._vocabulary.says(token), self._vocabulary.byte(token)
        if said is None:
            return ""
        if byte is not None:
            self._run.push(token, byte)
            return ""
        before = self.end()
        if self._head is None:
            return before + said.decode()
        before += self._first([token])
        self._run = _Run(self._vocabulary, self._head)
        return before

    def end(self) -> str:
        """The run's text; a new run begins."""
        run = self._run
        if not run.tokens:
            return ""
        if self._head is not None:
            self._first(run.tokens)
        self._run = _Run(self._vocabulary, self._head)
        return run.text()

    def _first(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` behind a head without text."""
        assert self._head is not None
        text = self._vocabulary.decode([*self._head, *tokens])
        self._head = None if text else [*self._head, *tokens]
        return text


def _textless(vocabulary: Vocabulary, prompt: Sequence[int]) -> list[int] | None:
    """``prompt`` without what is left out, if it has no text; else None."""
    count = 1
    while count < len(prompt) and not vocabulary.decode(prompt[:count]):
        count *= 2
    if vocabulary.decode(prompt[:count]):
        return None
    return [token for token in prompt if vocabulary.says(token) is not None]


class _Run:
    """A run of single bytes. ``head`` are all tokens before it, where they have no text."""

    def __init__(self, vocabulary: Vocabulary, head: list[int] | None) -> None:
        self._vocabulary, self._before = vocabulary, vocabulary.context if head is None else head
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._characters, self._broken = "", False
        #: How many characters are left out where a text begins (a space); None until that is known.
        self._lost: int | None = 0 if head is None else None
        #: What of the run is the prompt's.
        self._given_characters = self._given_bytes = 0
        self.tokens: list[int] = []

    def hand_over(self) -> None:
        """What came so far is the prompt's, as far as it has a text."""
        if not self._complete or self._lost is not None:
            self._given_characters, self._given_bytes = len(self._characters), len(self.tokens)

    def push(self, token: int, byte: int) -> None:
        self.tokens.append(token)
        if self._broken:
            return
        try:
            self._characters += self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self._broken = True
        if self._lost is None and self._complete:
            seen = self._vocabulary.behind(self._before, self.tokens)
            self._lost = len(self._characters) - len(seen) if seen else None

    @property
    def whole(self) -> str:
        """The text, if the run were to end here and all its characters are whole."""
        if not self._complete or self._lost is None:
            return ""
        return self._characters[max(self._given_characters, self._lost) :]

    @property
    def length(self) -> int:
        """Characters so far: those that are whole or, once the run can no longer become UTF-8, a replacement a byte."""
        if self._broken:
            return len(self.tokens) - self._given_bytes
        if self._lost is None:
            return 0
        return len(self._characters) - max(self._given_characters, self._lost)

    def text(self) -> str:
        """The text of the run, which ends here."""
        if not self.tokens:
            return ""
        seen = self._vocabulary.behind(self._before, self.tokens)
        if not self._complete:
            return seen[self._given_bytes :]  # a replacement for each byte
        lost = len(self._characters) - len(seen)
        return seen[max(self._given_characters - lost, 0) :]

    @property
    def _complete(self) -> bool:
        return not self._broken and not self._decoder.getstate()[0]


class Whole:
    """Tokens whose text depends on those behind them: it is settled at the end."""

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._tokens = list(prompt)
        # The prompt's text, and what is left of it where its last character is not finished, or changes.
        self._beginnings = [vocabulary.decode(prompt[: max(len(prompt) - less, 0)]) for less in range(4)]

    @property
    def pending(self) -> str:
        return self._text().rstrip(REPLACEMENT)

    @property
    def waiting(self) -> int:
        return len(self.pending)

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def end(self) -> str:
        text = self._text()
        self._tokens, self._beginnings = [], [""]
        return text

    def _text(self) -> str:
        text = self._vocabulary.decode(self._tokens)
        return text[max((len(each) for each in self._beginnings if text.startswith(each)), default=0) :]
