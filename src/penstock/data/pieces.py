"""Long texts in pieces: the tokens of the whole, in the memory of a piece.

A tokenizer needs some 150 bytes a character while it works, so a text of 20 MB takes 3 GB at once. Most tokenizers cut
a text into words first (by a pattern, from left to right, without looking back) and never merge across a cut. So a text
may be encoded in pieces that end where a word begins. The pieces overlap by a few words: what a tokenizer does at the
very beginning of a text (a space before the first word, say) falls on words that are encoded already, and whether the
tokens of the other words there are the same is compared, each time. A word of more than a million characters (a
genome, say) is cut. A tokenizer that makes no words encodes the whole.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

#: Characters of a piece, and of the pieces of a text that tokens are learnt from.
PIECE = 1 << 18

#: Words before a piece that are encoded again, at first and where that was too little; then all of the text.
OVERLAPS = (8, 256)

#: Words at the end of a piece that the text after it may still change.
TAIL = 16

#: Characters that a word may have.
LONGEST = 1 << 20

#: Where a tokenizer of ours (:data:`~penstock.data.tokenizer.PIECES`) always cuts, as few do not: before white space
#: behind what is none, and before punctuation, of ASCII, East Asia or print, behind a letter or a digit.
CUT = re.compile(r"(?<=\S)[ \t\r\n]|(?<=[^\W_])[!-/:-@\[-`{-~\u2010-\u2027\u3001-\u3020\uff01-\uff0f\uff1a-\uff20]")


class Word(NamedTuple):
    """Where a word begins: its first token, and its first character in the piece."""

    token: int
    character: int


class Piece(NamedTuple):
    """A part of a text: its first character, its tokens and words, and the first token that is new."""

    begin: int
    ids: list[int]
    words: list[Word]
    first: int


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that encodes texts alone: no padding, no truncation, nothing added, and special tokens' names in a text
    are text like any other."""
    contents = json.loads(tokenizer.to_str())
    # It may also trim offsets, from which it is seen where words begin.
    contents |= {"post_processor": None, "padding": None, "truncation": None}
    copy = Tokenizer.from_str(json.dumps(contents))
    copy.encode_special_tokens = True
    return copy


def encode(tokenizer: Tokenizer, text: str, size: int = PIECE) -> Iterator[list[int]]:
    """The tokens of ``text``, piece by piece; ``tokenizer`` is one of :func:`plain`.

    Args:
        size: characters of a piece. A piece is longer where no word begins in it that may begin the next one.
    """
    done = given = 0  # characters whose tokens have been given, and how many tokens
    before: list[tuple[int, list[int]]] = []  # where the next piece may begin, and the tokens from there to ``done``
    width = size
    while done + width < len(text):
        found = _from(tokenizer, text, done, done + width, before)
        if found is None:
            break
        begin, ids, words, first = found
        ends = [word for word in words[1:-TAIL] if word.token > first and _divides(text, begin + word.character)]
        if not ends and width >= LONGEST and tokenizer.pre_tokenizer is not None:
            yield ids[first:]
            yield from encode(tokenizer, text[done + width :], size)
            return
        if not ends:
            width *= 2
            continue
        end = ends[-1]
        yield ids[first : end.token]
        inner = [word for word in words if word.token < end.token and _divides(text, begin + word.character)]
        before = [(begin + inner[-n].character, ids[inner[-n].token : end.token]) for n in OVERLAPS if len(inner) > n]
        done, given, width = begin + end.character, given + end.token - first, size
    found = _from(tokenizer, text, done, len(text), before)
    if found is None:
        yield tokenizer.encode(text, add_special_tokens=False).ids[given:]
    else:
        yield found.ids[found.first :]


def _from(tokenizer: Tokenizer, text: str, done: int, end: int, before: list[tuple[int, list[int]]]) -> Piece | None:
    """The piece of the text that goes on from the character ``done`` to ``end``. None where no beginning of those in
    ``before`` leads to the same tokens."""
    if not done:
        encoding = tokenizer.encode(text[:end], add_special_tokens=False)
        return Piece(0, encoding.ids, _words(encoding), 0)
    for begin, known in before:
        encoding = tokenizer.encode(text[begin:end], add_special_tokens=False)
        ids, words = encoding.ids, _words(encoding)
        first = next((word.token for word in words if begin + word.character == done), None)
        second = words[1].token if len(words) > 1 else 0
        # The first word stands at the beginning of a text here, and did not there: only the others must be alike.
        if first is not None and second < first and ids[second:first] == known[len(known) - first + second :]:
            return Piece(begin, ids, words, first)
    return None


def _words(encoding: Encoding) -> list[Word]:
    """The words of an encoding, without those that share a character with the one before."""
    words: list[Word] = []
    reached, last = -1, None
    for token, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if word != last and start >= reached and (not words or start > words[-1].character):
            words.append(Word(token, start))
        reached, last = max(reached, end), word
    return words


def _divides(text: str, place: int) -> bool:
    """Whether no normalization reaches across: an ASCII character never melts into the one before it, nor does one that
    Unicode composes with nothing there."""
    if text[place].isascii():
        return True
    before, after = text[place - 1 : place], text[place]
    return not unicodedata.combining(after) and all(
        normalize(before + after) == normalize(before) + normalize(after) for normalize in _FORMS
    )


_FORMS = [functools.partial(unicodedata.normalize, form) for form in ("NFC", "NFKC")]


def parts(text: str, size: int = PIECE) -> Iterator[str]:
    """``text`` in parts of ``size`` characters, and those that follow up to the next :data:`CUT`, which are as many at
    most: a word that is longer is cut."""
    begin = 0
    while begin < len(text):
        found = CUT.search(text, begin + size, begin + 2 * size)
        end = found.start() if found else begin + 2 * size
        yield text[begin:end]
        begin = end
