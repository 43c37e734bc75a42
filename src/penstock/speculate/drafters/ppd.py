"""Prompt tokens behind what is verified."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.contract import Draft, Drafter, Shaper
from penstock.speculate.drafters.model import ModelDraft
from penstock.speculate.shaping import SparseTrees, fitting
from penstock.speculate.tree import Tree


class ProbedDraft(ModelDraft):
    """Leaves to the probes of the step before what is drafted, and to the shaper how it branches."""

    def shape(self, shaper: Shaper, guessed: int, ahead: int, most: int) -> Tree:
        return fitting(shaper.shape(min(guessed, self._most)), ahead, most)


@policy("speculate.drafter", "ppd", papers=[333])
class ParallelPromptDecoding(Drafter):
    """What trained prompt tokens guess that ride in the verifying step itself, so that drafting takes no pass of its
    own (parallel prompt decoding).

    Pays where a step costs about as much for some tens of rows as for one, and memory for a drafting model is short:
    the head is a vector for each token ahead. Behind each drafted token, and behind the newest one, stand some prompt
    tokens in the step; those of the token that is accepted last guess what is drafted next. Nothing of them stays in
    the cache. From the paper: prompt tokens as rows of a tree that is masked by ancestors, and a sparse tree that is
    chosen by what the device takes for it. From knowledge: a tree for each number of prompt tokens that the last
    accepted token may have, and what is maximised, the tokens of a step amortized over these states, divided by what a
    step of the tree's size takes. Ours: the trees are the best there are, not greedy ones
    (:mod:`penstock.speculate.sparse_tree`), planned anew from what was accepted lately in this engine and not from a
    validation set beforehand; times are those that the controller ``measured`` has, without which all rows are taken
    to cost alike; and where nothing is guessed yet, a step probes and drafts nothing. Not built: other drafters beside
    it in the same step.

    Attributes:
        source: the folder of a head of the kind ``ppd``, or of the run that trained one.
        tokens: most that are drafted on a way, no more than there are prompt tokens.
        drafts: most for a place; 1 drafts chains.
        size: most rows of a sequence beside its newest token, drafted tokens and prompt tokens together.
    """

    source: Annotated[str, Field(min_length=1, examples=["runs/ppd"])]
    tokens: Annotated[int, Field(ge=1, le=8)] = 3
    drafts: Annotated[int, Field(ge=1, le=8)] = 4
    size: Annotated[int, Field(ge=1, le=64)] = 24

    @property
    def most(self) -> int:
        return self.tokens

    @property
    def head(self) -> str:
        return self.source

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.drafts,) * self.tokens

    @property
    def rows(self) -> int:
        return self.size

    def shaper(self) -> Shaper:
        return SparseTrees(self.tokens, self.drafts, self.size)

    def start(self, tokens: List[int]) -> Draft:
        return ProbedDraft(self.tokens)
