"""A head on the model itself."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.contract import Draft, Drafter
from penstock.speculate.drafters.model import ModelDraft


@policy("speculate.drafter", "head", papers=[162])
class Head(Drafter):
    """What a head says that was trained for this very model, from its first layers or its hidden states.

    Pays where no smaller model with the same vocabulary is at hand, or memory for one. From the paper: the model's own
    first layers draft for it, and it verifies what they say as any draft. Which head it is stands in its folder.

    Attributes:
        source: the folder of a head, or of the run that trained one.
        tokens: most that are drafted at a time; a head that foresees fewer drafts fewer.
    """

    source: Annotated[str, Field(min_length=1, examples=["runs/drafter"])]
    tokens: Annotated[int, Field(ge=1, le=64)] = 4

    @property
    def most(self) -> int:
        return self.tokens

    @property
    def head(self) -> str:
        return self.source

    @property
    def branches(self) -> bool:
        return True

    def start(self, tokens: List[int]) -> Draft:
        return ModelDraft(self.tokens)
