"""What the rows of a step ask of their next tokens, as arrays."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from penstock.ops.logprobs import wanted_by
from penstock.serve.decode.contract import DecodeRule
from penstock.speculate.tree import path

#: Temperature and cuts of a row; top_k is 0 where there is none.
OPTIONS = [("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8")]

#: What is kept of a slot, besides: the key of its draws, how many tokens were given, penalties, how long no token may
#: end the text, how many alternatives are told (-1: no log-probabilities), and what of a sequence has to be looked at.
SLOT = np.dtype(
    [
        *OPTIONS,
        ("key", "u8"),
        ("prompt", "i8"),
        ("charges", "f8", (3,)),
        ("least", "i8"),
        ("alternatives", "i8"),
        *(
            (name, "?")
            for name in ("penalized", "biased", "grammar", "rule", "rescored", "led", "spread", "restricted", "special")
        ),
    ]
)


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Values for single scores: ``rows`` int64 [n], ``tokens`` int64 [n], ``values`` float32 [n]."""

    rows: np.ndarray
    tokens: np.ndarray
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Masked:
    """Tokens that may come: ``words`` int32 [M, words] for the rows ``rows`` int64 [M], 32 tokens a word, the least
    significant bit first."""

    rows: np.ndarray
    words: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ruled:
    """Rows whose rule is computed alike: ``rows`` int64 [R, n], those of all members of each group, the one that
    chooses first; ``known`` is what the rule read of the text."""

    rule: DecodeRule
    rows: np.ndarray
    known: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What S sequences want of the tokens that come next: R rows, one for the newest token of each and, behind it, one
    for each tentative token.

    Attributes:
        first: int64 [S], the row of each sequence's newest token.
        slots: int64 [R], of their sequences.
        counts: int64 [R], generated tokens before the one that is wanted.
        rows: SLOT [R], as it holds for this token.
        uniform: float64 [R], the draws.
        biases: are added to scores; None where there are none.
        bans: (rows, tokens) int64, tokens that may not come.
        masks: of grammars and restrictions; None where there are none.
        rules: of rows that have one.
        followers: int64 [2, F]: rows that take the token of another, and that other.
        window: int64 [S, W], the tentative tokens of each sequence, -1 behind them; None where there are none at all.
        parents: int64 [S, W], where in the window the token before each stands, -1 for the newest; None where all are
            in a row.
    """

    first: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    uniform: np.ndarray
    biases: Scattered | None = None
    bans: np.ndarray | None = None
    masks: Masked | None = None
    rules: tuple[Ruled, ...] = ()
    followers: np.ndarray | None = None
    window: np.ndarray | None = None
    parents: np.ndarray | None = None

    @property
    def plain(self) -> bool:
        """Whether all tokens are drawn from the logits as they are."""
        return not (self.rows["rescored"].any() or self.rows["led"].any())

    @functools.cached_property
    def draws(self) -> np.ndarray:
        """float64 [5, R]: temperature and cuts of each, in the order of OPTIONS, and the number by which it is drawn:
        0 for the first of the most probable tokens."""
        rows = self.rows
        draws = np.empty((len(OPTIONS) + 1, len(rows)))
        for place, (name, _) in enumerate(OPTIONS):
            draws[place] = rows[name]
        draws[-1] = np.where(draws[0] > 0, self.uniform, 0)
        return draws

    @property
    def wanted(self) -> np.ndarray:
        """int64 [R]: what log-probabilities each wants, see :func:`~penstock.ops.logprobs.wanted_by`."""
        return wanted_by(self.rows["alternatives"], self.rows["spread"])

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """int64 [R]: which of the S sequences a row belongs to."""
        owners: np.ndarray = np.repeat(np.arange(len(self.first)), np.diff(self.first, append=len(self.slots)))
        return owners

    @functools.cached_property
    def nodes(self) -> np.ndarray:
        """int64 [R]: behind what a row chooses: 0 for the newest token, and i + 1 for the window's token i."""
        return nodes_of(self.first, self.owners, self.window)

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """int64 [R]: how many tentative tokens are before what a row chooses."""
        return depths_of(self.owners, self.nodes, self.parents)

    def ahead(self, row: int) -> list[int]:
        """The tentative tokens before what ``row`` chooses."""
        if self.window is None:
            return []
        owner, node = self.owners[row], int(self.nodes[row]) - 1
        way = range(node + 1) if self.parents is None else path(self.parents[owner].tolist(), node)
        tokens: list[int] = self.window[owner, list(way)].tolist()
        return tokens

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]: tokens before what a row chooses."""
        lengths: np.ndarray = self.rows["prompt"] + self.counts
        return lengths


def nodes_of(first: np.ndarray, owners: np.ndarray, window: np.ndarray | None) -> np.ndarray:
    """As :attr:`Asked.nodes`, of rows int64 [R] of their ``owners``: a sequence has one for the last of these."""
    offsets: np.ndarray = np.arange(len(owners)) - first[owners]
    if window is None:
        return offsets
    skipped = 1 + (window >= 0).sum(-1) - np.diff(first, append=len(owners))
    nodes: np.ndarray = offsets + skipped[owners]
    return nodes


def depths_of(owners: np.ndarray, nodes: np.ndarray, parents: np.ndarray | None) -> np.ndarray:
    """As :attr:`Asked.depths`."""
    if parents is None:
        return nodes
    depths = np.zeros((len(parents), 1 + parents.shape[1]), np.int64)
    everyone = np.arange(len(parents))
    for node in range(parents.shape[1]):
        depths[:, node + 1] = depths[everyone, parents[:, node] + 1] + 1
    found: np.ndarray = depths[owners, nodes]
    return found
