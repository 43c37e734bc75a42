"""A small model in memory, for a large one on disk."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.drafters.model import Model


@policy("speculate.drafter", "cascade", papers=[428])
class Cascade(Model):
    """A smaller model that drafts on while the large one verifies (LLMCad).

    Pays where verification waits for something else than the processor: where the large model's layers are read from
    disk (``resident_weights``). From the paper: the small model in memory drafts a tree of tokens (``draft_tree``), the
    large one verifies all branches at once, and the small one goes on meanwhile, in what the paper calls a compute-IO
    pipeline, so that a step takes as long as drafting or reading, whichever takes longer. When verification is due is
    the controller's affair (``fallback``). Ours: it guesses that all of the way that it would take itself is accepted,
    says what it would say next, and drafts behind that as in a step of its own; where this is what comes out, the next
    step has its drafts at once, and else they are dropped, and drafting that is still under way ends behind its pass.
    Not built: several guesses at a time, and branches that are drafted at a pace set by confidence.

    Attributes:
        source: a model folder, a run folder, a boxed model or a hub name.
        tokens: most that are drafted at a time.
    """

    tokens: Annotated[int, Field(ge=1, le=64)] = 8

    @property
    def meanwhile(self) -> bool:
        return True
