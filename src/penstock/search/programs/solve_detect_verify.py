"""Solve, detect, verify: a solution is checked where it is complete, and revised where it is wrong."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.asking import asked, reopened, said


@policy("search.program", "solve_detect_verify", papers=[435])
class SolveDetectVerify(Program):
    """Stops a text where a solution is complete, and has it verified: by several fast checks, a word each, and, where
    they disagree, by a slow one that thinks first. What the verifier finds wrong is handed back to the solver, which
    goes on from there; a text that passes is the answer.

    From the paper: the pipeline, and fast checks before slow ones. From knowledge: disagreement is what calls for the
    slow one. Ours: a solution is complete where it matches a regular expression, where the paper's verifier looks for
    words of hesitation; the verifier is a model that is asked, not one that was trained to verify.

    Attributes:
        complete: a regular expression that a complete solution matches; a text that ends is complete too.
        attempts: solutions at most.
        fast: checks of one solution.
        slow: tokens of a slow check, at most.
        verifier: the model that checks; the solver itself without a name.
        question, yes, no: what it is asked, and its replies.
        feedback: what stands between a solution and what was found wrong with it.
        again: what stands behind that.
    """

    complete: str = r"\\boxed\{.*\}"
    attempts: PositiveInt = 3
    fast: PositiveInt = 3
    slow: PositiveInt = 256
    verifier: str = ""
    question: str = "\n\nIs this right? Say yes or no.\n"
    yes: str = "yes"
    no: str = "no"
    feedback: str = "\n\nWait, this is wrong.\n"
    again: str = "\n\nOnce more:\n"

    def asks(self) -> tuple[str, ...]:
        return (self.verifier,) if self.verifier else ()

    async def run(self, search: Search) -> Branch | None:
        branch = search.root.fork(1)[0]
        found: list[Branch] = []
        search.notes["slow"] = 0
        for attempt in range(self.attempts):
            await branch.extend(pattern=self.complete)
            found.append(branch)
            if self.attempts == 1:
                break
            right, critique = await self.verified(search, branch)
            branch.score = float(right)
            if right or attempt == self.attempts - 1:
                break
            branch = reopened(branch).ask(self.feedback + critique + self.again)
        search.notes["attempts"] = len(found)
        return search.best(found)

    async def verified(self, search: Search, branch: Branch) -> tuple[bool, str]:
        """Whether the solution is right, and what the verifier said."""
        question = asked(branch, self.question, self.verifier)
        checks = question.fork(self.fast)
        for check in checks:
            check.fate = "aside"
        await search.extend(checks, tokens=2)
        verdicts = [said(each.text, self.yes, self.no) for each in checks]
        if verdicts[0] is not None and len(set(verdicts)) == 1:
            return verdicts[0], checks[0].text
        search.notes["slow"] += 1
        slow = question.fork(1)[0]
        slow.fate = "aside"
        await slow.extend(tokens=self.slow)
        return said(slow.text, self.yes, self.no) is True, slow.text

    @classmethod
    def limit(cls) -> Program:
        return cls(attempts=1, complete=r"(?!)")
