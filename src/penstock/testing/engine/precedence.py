"""Who is thrown out, and who comes back first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.core.events import Event
from penstock.serve.engine.batch import Entry
from penstock.testing.engine.accounts import Account, Name


class Precedence:
    """Asserts, of what the engine tells of its decisions, that the least urgent that came last goes, that one who was
    thrown out returns before anybody of the same priority and key who has not run yet, and that nobody finds more in
    the cache than there is of him.

    Args:
        accounts: of all continuations, in the order in which they arrived; others add to them.

    Attributes:
        found: tokens that those who were let in for the first time found in the cache.
    """

    def __init__(self, accounts: Mapping[Name, Account]) -> None:
        self._accounts, self._thrown = accounts, set[Name]()
        self.found = 0

    def hear(self, event: Event) -> None:
        """Takes note of a decision."""
        name = event.id, event.index
        if event.kind == "preempted":
            by = str(event.detail["by"]), int(event.detail["by_index"])
            assert self._rank(by) <= self._rank(name), "one who came earlier is thrown out for a later one"
            self._thrown.add(name)
        elif event.kind == "admitted":
            cached, tokens = int(event.detail["cached"]), int(event.detail["tokens"])
            assert cached < tokens, (
                f"{cached} of its {tokens} tokens were in the cache, and the last is computed always"
            )
            if name not in self._thrown:
                self.found += cached
                own = self._accounts[name].request
                others = [self._accounts[each].request for each in self._thrown]
                before = [each for each in others if (each.priority, each.key) == (own.priority, own.key)]
                assert not before or "forked" in event.detail, "one who was thrown out is overtaken by a newcomer"
            self._thrown.discard(name)
        elif event.kind == "finished":
            self._thrown.discard(name)

    def judge(self, event: Event, entries: Sequence[Entry]) -> None:
        """Those who had their turn in the step after a preemption, of which these are the ``entries``, and had not had
        it before, could have been thrown out too."""
        if not any(each.sequence.guessed or each.window for each in entries):
            after = [each.sequence for each in entries[int(event.detail["taken"]) :] if each.sequence.leader is None]
            victim = self._rank((event.id, event.index))
            later = [each for each in after if self._rank((each.request.id, each.index)) > victim]
            assert not later, "one who came later keeps his memory"

    def _rank(self, name: Name) -> tuple[int, int]:
        """Priority, then arrival."""
        return self._accounts[name].request.priority, list(self._accounts).index(name)
