"""The contract ``search.program``: how a budget is spent on a problem."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

from penstock.policy import Policy, contract, unwritten
from penstock.search.branch import Branch
from penstock.search.search import Search


@contract(
    "search.program",
    law="the ledger is never above the budget, whatever its unit and amount, and equals a recount of what the engine "
    "did; in the case of one sample that the policy gives, token for token what plain sampling gives with the same "
    "seed; a branch that is forked computes nothing again but its newest token; the same seed gives the same tree, "
    "whatever else the engine serves; a scorer that fails is counted, and ends nothing, and no text on which it failed "
    "is the answer where there is another; nothing stays in the cache",
)
class Program(Policy):
    """Grows a tree of texts for a problem, and picks one of them.

    A program has no input or output of its own: it waits for what :class:`~penstock.search.search.Search` gives it to
    wait for, and whoever runs it decides when that is done. So one engine serves many programs at once, and a test can
    play one through all that may happen.
    """

    def check(self, problem: Mapping[str, Any]) -> None:
        """Refuses a problem whose fields it cannot read, before anything is drawn.

        Raises:
            UsageError: it cannot.
        """

    def asks(self) -> tuple[str, ...]:
        """The names of the further models that it may ask."""
        return ()

    def __call__(self, search: Search) -> Coroutine[Any, Any, Branch | None]:
        """:meth:`run`."""
        return self.run(search)

    async def run(self, search: Search) -> Branch | None:
        """Spends the budget of ``search`` and gives the branch with the answer; None for the best finished leaf. Where
        the budget ends it, the best of what there is becomes the answer."""
        raise NotImplementedError

    @classmethod
    def limit(cls) -> Program:
        """The case in which the program draws a single sample."""
        raise unwritten(cls, "limit()", "return cls(...) with options under which one text is drawn, to its end")
