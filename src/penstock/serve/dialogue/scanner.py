"""Reads a text that comes in chunks, in the order in which a format has its parts.

A format is read by a generator, written as if all of the text were there: where it is not, the generator yields None,
and goes on once there is more. What it decides so depends on the text alone, never on how it was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from penstock.core.strict_json import parsed
from penstock.serve.dialogue.answer import Arguments, Content, Event, parsed_text

T = TypeVar("T")

#: Yields what is read, and None where more text is needed.
Reading = Generator[Event | None, None, T]

#: What may be in the name of a function.
NAME = re.compile(r"[^\W\d][\w.:/-]{0,255}")

#: What may be in a number or word of JSON.
SCALAR = re.compile(r"[\w.+-]*")

SPACE = re.compile(r"\s*")
BRACKETS = re.compile(r'["{}\[\]]')
QUOTED = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class Scanner:
    """A text, and the place up to which it is read.

    Attributes:
        place: what is before it is read. It may be set back to where it was since the last event.
    """

    def __init__(self) -> None:
        self._text, self._ended = "", False
        self.place = 0
        #: Where the white space before the newest marker begins, and where that marker ends.
        self._before = self._behind = 0
        self._trim = False

    def feed(self, text: str, ended: bool = False) -> None:
        """``text`` follows; with ``ended`` it is the last."""
        self._text += text
        self._ended = self._ended or ended

    def trim(self) -> None:
        """White space that follows here is layout."""
        self._trim = True

    def more(self) -> Reading[bool]:
        """Waits for more text; whether there is any."""
        length = len(self._text)
        while len(self._text) == length:
            if self._ended:
                return False
            yield None
        return True

    def peek(self) -> Reading[str]:
        """The next letter, which is not read; empty at the end."""
        while self.place >= len(self._text):
            if not (yield from self.more()):
                break
        return self._text[self.place : self.place + 1]

    # Words of the format

    def take(self, literal: str) -> Reading[bool]:
        """Reads ``literal``, if it stands here."""
        while True:
            here = self._text[self.place : self.place + len(literal)]
            if here == literal:
                self.place += len(literal)
                return True
            if not literal.startswith(here) or not (yield from self.more()):
                return False

    def take_behind_space(self, literal: str) -> Reading[bool]:
        """Reads ``literal``, if it stands behind nothing but white space; else that stays, too."""
        start = self.place
        yield from self.space()
        found = yield from self.take(literal)
        if not found:
            self.place = start
        return found

    def take_one(self, *literals: str) -> Reading[str | None]:
        """Reads the one of ``literals`` that stands here."""
        for literal in literals:
            if (yield from self.take(literal)):
                return literal
        return None

    def match(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Reads the longest match of ``pattern``; it may be empty."""
        while True:
            found = pattern.match(self._text, self.place)
            if self.place < len(self._text) and (found is None or found.end() < len(self._text)):
                break
            if not (yield from self.more()):
                found = pattern.match(self._text, self.place)
                break
        text = "" if found is None else found[0]
        self.place += len(text)
        return text

    def space(self) -> Reading[str]:
        """Reads white space."""
        return (yield from self.match(SPACE))

    def name(self) -> Reading[str]:
        """Reads the name of a function, or nothing."""
        return (yield from self.match(NAME))

    def until(self, *ends: str) -> Reading[tuple[str, str | None]]:
        """Reads up to the first of ``ends``, and over it: what is before, and which it is. None is the text's end."""
        start = self.place
        while True:
            found = self._first(ends, start)
            if found is not None:
                place, end = found
                text, self.place = self._text[self.place : place], place + len(end)
                return text, end
            start = max(self.place, len(self._text) - max(map(len, ends)) + 1)
            if not (yield from self.more()):
                text, self.place = self._text[self.place :], len(self._text)
                return text, None

    def _first(self, literals: tuple[str, ...], start: int) -> tuple[int, str] | None:
        places = [(self._text.find(each, start), -len(each), each) for each in literals]
        found = [each for each in places if each[0] >= 0]
        return (min(found)[0], min(found)[2]) if found else None

    def parts(self) -> Reading[list[str] | None]:
        """Reads over the parenthesis that closes here, as Python nests and quotes: what is between the commas before
        it. None where the text ends before."""
        start = begin = self.place
        found, depth, quote = [], 0, ""
        while True:
            letter = yield from self.peek()
            if not letter:
                self.place = start
                return None
            if quote and letter == "\\":
                self.place += 2
                continue
            if quote or letter in "\"'":
                quote = "" if letter == quote else quote or letter
            elif letter in "([{":
                depth += 1
            elif letter in ")]}" or (letter == "," and not depth):
                if not depth:
                    found.append(self._text[begin : self.place])
                    begin = self.place + 1
                depth -= letter != ","
            self.place += 1
            if depth < 0:
                return found

    # What the model says

    def say(self, kind: Callable[[str], Event], *markers: str) -> Reading[str | None]:
        """Passes on text as ``kind`` up to the first of ``markers``, and reads over that: which it is, None at the
        text's end. White space before a marker is layout, and so is what follows where :meth:`trim` was called."""
        if self._trim:
            yield from self.space()
            self._trim = False
        while True:
            found = self._first(markers, self.place)
            end = len(self._text) if found is None else found[0]
            if found is None and not self._ended:
                end -= max((_overlap(self._text, self.place, marker) for marker in markers), default=0)
            kept = len(self._text[self.place : end].rstrip()) + self.place
            if found is not None:
                yield from self._pass(kind, kept)
                self._before, self._behind = self.place, self.place + found[0] - kept + len(found[1])
                self.place = self._behind
                return found[1]
            if self._ended:
                yield from self._pass(kind, end)
                return None
            yield from self._pass(kind, kept if markers else end)
            yield from self.more()

    def _pass(self, kind: Callable[[str], Event], end: int) -> Reading[None]:
        """Passes on what is before ``end``, and forgets it."""
        text = self._text[self.place : end]
        self._text, self.place = self._text[end:], 0
        if text:
            yield kind(text)

    def back(self) -> Reading[None]:
        """The newest marker was none: it is said as it stands, and what is behind it is read anew."""
        text, self.place = self._text[self._before : self._behind], self._behind
        yield Content(text)

    # JSON

    def string(self) -> Reading[str | None]:
        """Reads a JSON string; None where none stands here."""
        start = self.place
        if (yield from self.take('"')):
            while (found := QUOTED.match(self._text, self.place)) is None:
                if not (yield from self.more()):
                    break
            if found is not None:
                self.place = found.end()
                return parsed_text(self._text[start : self.place])
        self.place = start
        return None

    def value(self) -> Reading[str | None]:
        """Reads the text of a JSON value; None where none stands here."""
        start = self.place
        first = yield from self.take_one('"', "{", "[")
        self.place = start
        if first == '"':
            found = yield from self.string()
            return None if found is None else self._text[start : self.place]
        if first is None:
            return (yield from self.match(SCALAR)) or None
        nesting = _Nesting()
        while not nesting.read(self._text, self.place):
            self.place = len(self._text)
            if not (yield from self.more()):
                self.place = start
                return None
        self.place = nesting.end
        return self._text[start : self.place]

    def arguments(self) -> Reading[None]:
        """Passes on the arguments of a call as they come: a JSON object. One that is written as a string is unpacked,
        and null is the empty one."""
        first = yield from self.take_one("{", '"')
        if first == "{":
            self.place -= 1
            nesting = _Nesting()
            while not nesting.read(self._text, self.place):
                yield from self._pass(Arguments, len(self._text))
                if not (yield from self.more()):
                    return
            yield from self._pass(Arguments, nesting.end)
            return
        self.place -= first is not None
        text = (yield from self.value()) or ""
        inner = parsed_text(text) if first else None
        yield Arguments("{}" if text == "null" else inner if inner is not None and _is_object(inner) else text)


class _Nesting:
    """Looks for the end of a JSON object or array, also in one that is no JSON otherwise."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False
        self.end = 0

    def read(self, text: str, start: int) -> bool:
        """Goes on with ``text`` from ``start``; whether :attr:`end` is found."""
        place = start
        while place < len(text):
            if self._quoted:
                place = self._quotation(text, place)
                continue
            found = BRACKETS.search(text, place)
            if found is None:
                return False
            place = found.end()
            if found[0] == '"':
                self._quoted = True
            else:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth <= 0:
                    self.end = place
                    return True
        return False

    def _quotation(self, text: str, place: int) -> int:
        """The place behind the end of a string, or of the text."""
        while place < len(text):
            letter = text[place]
            place += 1
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._quoted = False
                break
        return place


def _overlap(text: str, start: int, marker: str) -> int:
    """The length of the longest end of ``text``, behind ``start``, that begins ``marker``."""
    most = min(len(text) - start, len(marker) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(marker[:length])), 0)


def _is_object(text: str) -> bool:
    try:
        return isinstance(parsed(text), dict)
    except ValueError:
        return False
