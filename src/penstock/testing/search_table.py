"""Search over a model that is a table: all that can happen is enumerated, with its probability.

A program's draws and its own choices are played through one after the other, so that what a law says of expectations
holds exactly or not at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from penstock.core.errors import UsageError
from penstock.models.config import DecoderConfig
from penstock.search.play import Play
from penstock.search.prices import Prices
from penstock.search.scorers.contract import Verdict
from penstock.search.search import Judge, Search, Voice, Work

#: The shape that costs are counted by.
SHAPE = DecoderConfig(vocabulary=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, ffn=8, context=64)

PRICES = Prices(SHAPE)

#: Letters that are tokens; the last ends a text.
LETTERS = "\nabcdefghij$"
END = len(LETTERS) - 1


class Letters:
    """Texts whose tokens are letters. See :class:`~penstock.search.search.Texts`."""

    def encode(self, text: str) -> list[int]:
        """A token for each letter; of a text with other ones, such as a question in words, one for each word."""
        if all(letter in LETTERS for letter in text):
            return [LETTERS.index(letter) for letter in text]
        return [sum(map(ord, word)) % END for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        """A letter for each token."""
        return "".join(LETTERS[token % len(LETTERS)] for token in tokens)

    def stream(self, before: Sequence[int]) -> Letters:
        """Reads letters, whatever comes before them."""
        return self

    def push(self, tokens: Iterable[int]) -> str:
        """A letter for each token."""
        return self.decode(list(tokens))


#: The distribution of the letter that follows a text.
Table = Callable[[str], Mapping[str, float]]

#: What a text is worth: the text, and whether it has ended.
Worth = Callable[[str, bool], float]


class _Path:
    """One way through all choices: the first are given, the others take what comes first."""

    def __init__(self, given: Sequence[int]) -> None:
        self._given = given
        self.taken: list[tuple[int, int]] = []  # (which, of how many)
        self.probability = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        options = [place for place, weight in enumerate(weights) if weight > 0]
        at = len(self.taken)
        which = self._given[at] if at < len(self._given) else 0
        self.taken.append((which, len(options)))
        self.probability *= weights[options[which]] / math.fsum(weights)
        return options[which]

    def following(self) -> list[int] | None:
        """The choices of the next way; None after the last."""
        taken = list(self.taken)
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        return [*(which for which, _ in taken[:-1]), taken[-1][0] + 1] if taken else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One way that a search can go: how probable it is, and its play."""

    probability: float
    play: Play

    @property
    def text(self) -> str:
        """Of the answer."""
        assert self.play.answer is not None
        return self.play.answer.text


def outcomes(
    program: Callable[[Search], Any],
    table: Table,
    worth: Worth,
    *,
    prompt: str = "a",
    problem: Mapping[str, Any] | None = None,
    others: Mapping[str, Table] | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """All ways that ``program`` can go, with ``others`` as the tables of further models; ``options`` are those of
    :class:`~penstock.search.search.Search`. A table is asked for what follows all that stands behind the problem's
    prompt, questions too."""
    given: list[int] | None = []
    while given is not None:
        path = _Path(given)
        tokens, ends = Letters().encode(prompt), frozenset({END})
        voices = {name: Voice(Letters(), tuple(tokens), ends) for name in others or {}}
        search = Search(problem or {}, tokens, Letters(), ends=ends, dice=path, others=voices, **options)
        play = Play(search, program(search), PRICES, dict.fromkeys(voices, PRICES))
        while not play.done:
            _round(play, path, {"": table, **(others or {})}, worth)
        if play.error is not None:
            raise play.error
        yield Outcome(path.probability, play)
        given = path.following()


def _round(play: Play, path: _Path, tables: Mapping[str, Table], worth: Worth) -> None:
    while play.pieces:
        piece = play.pieces.pop(0)
        why, told = None, 0
        while why is None and told < piece.most:
            branch = piece.branch
            chances = tables[branch.model](Letters().decode(branch.tokens[branch.line[0].start :]))
            letters, shares = list(chances), [*chances.values()]
            if branch.temperature is not None:
                shares = tempered(shares, branch.temperature)
            letter = letters[path.choose(shares)]
            top = sorted(
                ((LETTERS.index(each), math.log(chances[each])) for each in letters if chances[each] > 0),
                key=lambda pair: -pair[1],
            )[: piece.top]
            told += 1
            token = LETTERS.index(letter)
            why = "stop" if token == END else None
            if play.told(piece, [token], [(math.log(chances[letter]), 0.0, 0.0)], [top] if piece.top else ()):
                break
        play.ended(piece, why, told)
    while play.errands:
        asked = play.errands.pop(0)
        if isinstance(asked, Judge):
            play.judged(asked, [Verdict(worth(each.text, each.finished)) for each in asked.branches])
            continue
        if isinstance(asked, Work):
            asked.run()
        else:
            asked.outcome = UsageError("a table has no hidden states")
        play.worked(asked)


def tempered(shares: Sequence[float], temperature: float) -> list[float]:
    """``shares`` to the power 1 / ``temperature``; at 0 all of it is the first of the largest."""
    if temperature == 0:
        return [float(place == shares.index(max(shares))) for place in range(len(shares))]
    powers = [share ** (1 / temperature) for share in shares]
    return [power / math.fsum(powers) for power in powers]


def texts(table: Table, most: int = 32) -> dict[str, float]:
    """All texts of the table, with their probabilities, by enumeration of their own."""
    found: dict[str, float] = {}
    open_texts = {"": 1.0}
    for _ in range(most):
        further: dict[str, float] = {}
        for text, chance in open_texts.items():
            for letter, share in table(text).items():
                if share > 0:
                    (found if letter == "$" else further)[text + ("" if letter == "$" else letter)] = chance * share
        open_texts = further
    return found | open_texts
