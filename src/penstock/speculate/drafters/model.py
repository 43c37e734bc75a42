"""A smaller model."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.contract import AWAITED, Draft, Drafter
from penstock.speculate.tree import Tree, full


class ModelDraft:
    """Leaves to the model what it drafts, and says no more than how much may be."""

    def __init__(self, most: int) -> None:
        self._most = most

    def extend(self, tokens: List[int]) -> None:
        """The model reads the text where the engine keeps it."""

    def propose(self, most: int) -> list[int]:
        return [AWAITED] * min(most, self._most)

    def grow(self, branches: List[int], depth: int, most: int) -> Tree:
        parents = full(branches, min(depth, self._most), most)
        return Tree([AWAITED] * len(parents), parents)


@policy("speculate.drafter", "model", papers=[63, 160])
class Model(Drafter):
    """What a smaller model with the same vocabulary says, token by token.

    Pays where the model is several times as fast and often of the same mind. From the papers: the chain of drafted
    tokens [63], for all sequences of a batch together, each of which takes as many as are accepted of its own [160].
    Ours: it draws with the temperature, cuts, penalties, biases and grammar of each request, by the very draws that the
    target chooses by where the verifier is ``exact_match``; and it has a cache of its own with the blocks of the
    target's, so that prefixes are shared, forked and evicted for both.

    Attributes:
        source: a model folder, a run folder, a boxed model or a hub name.
        tokens: most that are drafted at a time.
    """

    source: Annotated[str, Field(min_length=1, examples=["python-1m"])]
    tokens: Annotated[int, Field(ge=1, le=64)] = 5

    @property
    def most(self) -> int:
        return self.tokens

    @property
    def model(self) -> str:
        return self.source

    @property
    def branches(self) -> bool:
        return True

    def start(self, tokens: List[int]) -> Draft:
        return ModelDraft(self.tokens)
