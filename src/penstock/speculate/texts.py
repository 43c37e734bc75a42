"""Texts that are said, and where each short run of tokens stands in them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as List

#: Of so many places at which a run stands, the latest are known.
PLACES = 32


class Text(list[int]):
    """The tokens of a sequence; ``forgotten`` once nobody finds anything in it any more."""

    forgotten = False


class Texts:
    """The texts of some sequences, the oldest of which are forgotten.

    Args:
        run: tokens of a run.
        kept: most tokens of all texts together; a single text may have more.
    """

    def __init__(self, run: int, kept: int) -> None:
        self._run, self._kept, self._count = run, kept, 0
        self._texts: deque[Text] = deque()
        self._places: dict[tuple[int, ...], deque[tuple[Text, int]]] = {}

    def begin(self) -> Text:
        """A text without tokens."""
        text = Text()
        self._texts.append(text)
        return text

    def append(self, text: Text, token: int) -> None:
        """``text`` goes on by ``token``. One that is forgotten does so for itself alone."""
        text.append(token)
        if text.forgotten:
            return
        if len(text) >= self._run:
            place = self._places.setdefault(tuple(text[-self._run :]), deque(maxlen=PLACES))
            place.append((text, len(text)))
        self._count += 1
        while self._count > self._kept and len(self._texts) > 1:
            self._forget(self._texts.popleft())

    def places(self, text: Text) -> Iterator[tuple[Text, int]]:
        """Where else the last run of ``text`` stands, the latest first: the texts, and behind how many of their tokens;
        none where nothing is behind it yet."""
        return self.behind(text[-self._run :])

    def behind(self, run: List[int]) -> Iterator[tuple[Text, int]]:
        """Where the ``run`` stands, as of :meth:`places`; nowhere, if it has fewer tokens than are known."""
        known = self._places.get(tuple(run), ())
        return ((other, end) for other, end in reversed(known) if end < len(other))

    def followers(self, text: List[int], ahead: List[int]) -> Counter[int]:
        """Which tokens stand behind the last run of ``text`` and of what is ``ahead`` of it, and how often."""
        run = [*text[max(0, len(text) - self._run) :], *ahead][-self._run :]
        return Counter(other[place] for other, place in self.behind(run))

    def _forget(self, text: Text) -> None:
        text.forgotten = True
        self._count -= len(text)
        for end in range(self._run, len(text) + 1):
            run = tuple(text[end - self._run : end])
            left = deque((each for each in self._places.get(run, ()) if each[0] is not text), PLACES)
            if left:
                self._places[run] = left
            else:
                self._places.pop(run, None)
