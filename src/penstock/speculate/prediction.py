"""The text that a client expects, as drafts of its answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as List

#: How many of the last tokens are looked for in a prediction that the answer has left: at most, and at least.
LONGEST, SHORTEST = 4, 2


class Prediction:
    """Proposes what comes next in a ``prediction`` of the answer, up to ``most`` tokens at a time. The answer begins
    behind the first ``given`` tokens of the text.

    It follows the answer token by token. Where that says something else, it goes on behind the place, the next one if
    there is one, at which the last few tokens of the answer stand in the prediction.
    """

    def __init__(self, prediction: List[int], most: int, given: int = 0) -> None:
        self._prediction, self._most = list(prediction), most
        self._given = given  # tokens that are still to come before the answer
        self._place: int | None = 0
        self._last = 0
        self._recent: list[int] = []
        self._behind: dict[tuple[int, ...], list[int]] = {}
        for end in range(SHORTEST, len(self._prediction) + 1):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._behind.setdefault(tuple(self._prediction[end - length : end]), []).append(end)

    def extend(self, tokens: List[int]) -> None:
        before, self._given = self._given, max(0, self._given - len(tokens))
        for token in tokens[before:]:
            self._recent = [*self._recent[1 - LONGEST :], token]
            place = self._place
            followed = place is not None and self._prediction[place : place + 1] == [token]
            self._place = place + 1 if place is not None and followed else self._found()
            self._last = self._last if self._place is None else self._place

    def propose(self, most: int) -> list[int]:
        if self._place is None:
            return []
        return self._prediction[self._place : self._place + min(most, self._most)]

    def _found(self) -> int | None:
        for length in range(len(self._recent), SHORTEST - 1, -1):
            places = self._behind.get(tuple(self._recent[-length:]))
            if places:
                return places[bisect_left(places, self._last) % len(places)]
        return None
