"""CodeMonkeys: programs are written with tests of their own, which then vote."""

from __future__ import annotations

import re

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.allotting import top
from penstock.search.shared.asking import asked, reopened


@policy("search.program", "codemonkeys", papers=[365])
class CodeMonkeys(Program):
    """``trajectories`` are drawn in parallel. Each writes a program and, behind it, tests of its own; where the scorer,
    which runs them (``unit_tests``), says that some fail, the program is written anew behind what failed, up to
    ``turns`` times. Then the tests of all trajectories are run on all programs, the ``keep`` with the most that pass
    are shown to the model once more, which writes tests to tell them apart, and these decide; of equals, the vote.

    From the paper: joint programs and tests, both axes of scaling, voting by the tests of all, a last trajectory that
    selects. Ours: the wording; the last trajectory has one turn. Not built: reading a whole codebase for what matters;
    the problem's prompt, which is computed once for all trajectories, stands for it. The tests that were written stand
    in place of the problem's own, which are not looked at.

    Attributes:
        trajectories: in parallel.
        turns: programs of each, at most.
        keep: programs that the last selection sees.
        testing: what asks for tests, as lines that begin with assert.
        length: tokens of tests, at most.
        repair: what stands behind tests that fail.
    """

    trajectories: PositiveInt = 4
    turns: PositiveInt = 2
    keep: PositiveInt = 2
    testing: str = "\n\n# Tests:\nassert "
    length: PositiveInt = 128
    repair: str = "\n\n# Some of these fail. Once more:\n"

    async def run(self, search: Search) -> Branch | None:
        texts = search.root.fork(self.trajectories)
        if self.trajectories == 1 and self.turns == 1:
            return await texts[0].extend()
        pairs = await search.together(self._trajectory(search, text) for text in texts)
        programs = [text for text, _ in pairs]
        pooled = list(dict.fromkeys(test for _, tests in pairs for test in tests))
        await search.judge(programs, tests=pooled)
        votes = {each: each.worth for each in programs}
        best = top(programs, self.keep)
        search.notes |= {"tests": len(pooled), "votes": [each.score for each in programs]}
        if len(best) > 1:
            shown = "".join(f"\n\n{each.text}" for each in best)
            question = search.root.fork(1)[0].ask(shown + self.testing)
            question.fate = "aside"
            await question.extend(tokens=self.length)
            await search.judge(best, tests=assertions(question.text))
        return max(best, key=lambda each: (each.error is None, each.finished, each.worth, votes[each]))

    async def _trajectory(self, search: Search, text: Branch) -> tuple[Branch, list[str]]:
        """A program, and all tests that were written for it."""
        tests: list[str] = []
        for turn in range(self.turns):
            await text.extend()
            question = await asked(text, self.testing).extend(tokens=self.length)
            written = assertions(question.text)
            tests += written
            await search.judge([text], tests=written)
            if turn == self.turns - 1 or (written and text.score == 1):
                break
            text = reopened(text).ask("\n\n" + "\n".join(written) + self.repair)
        return text, tests

    @classmethod
    def limit(cls) -> Program:
        return cls(trajectories=1, turns=1)


def assertions(text: str) -> list[str]:
    """The tests in what stands behind a first ``assert``: whole lines."""
    return [f"assert {line}".rstrip() for line in re.split(r"\n\s*assert\s+|\n", text) if line.strip()]
