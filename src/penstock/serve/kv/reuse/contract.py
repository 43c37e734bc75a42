"""The contract ``kv.reuse``: how the contexts of a request are encoded, and what of them is reused.

A request may name contexts beside its prompt: documents that were retrieved, or examples. They stand behind the first
``shared`` tokens of the prompt, and before the rest. Other requests have some of them too, in another order and beside
others, where a prefix tree finds the first of them at most.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from penstock.policy import Policy, contract


class Weighing(NamedTuple):
    """How contexts that are encoded beside each other are attended to: by the ``temperature`` of their scores and the
    ``scale`` of their log-sum-exp, see :mod:`penstock.ops.paged.contexts`."""

    temperature: float
    scale: float


@contract(
    "kv.reuse",
    law="in the limiting case that the policy gives, one context gives the scores of the text in a row, to 1e-5; "
    "contexts that are encoded apart may come in any order; scores equal those of one softmax over all that a token "
    "sees; what is found in the cache is counted, and not computed again; the tokens of a request do not depend on the "
    "batch, on chunks, on sharing or preemption",
)
class Reuse(Policy):
    """Decides how the contexts of a request are encoded."""

    @property
    def weighing(self) -> Weighing | None:
        """How contexts are attended to that are encoded apart, each behind the prompt's shared tokens and at the
        positions behind these; None where they are encoded one behind the other, as a part of the prompt."""
        raise NotImplementedError

    def limit(self) -> Self:
        """The policy with options by which one context is as good as in a row."""
        raise NotImplementedError
