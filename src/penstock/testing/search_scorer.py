"""The law of ``search.scorer``.

What each clause is there to catch: an example that is scored otherwise, or otherwise when it is scored again or in
another order (state that is kept); scores that are no numbers; texts that make it raise, hang, fork, print without end
or fill the memory, and take other texts with them; texts that are run, and see the machine's other processes, or kill
what judges them. These last are run in every sandbox that works on the machine, not in the best alone.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from penstock.search.scorers import sandbox
from penstock.search.scorers.contract import Candidate, Scorer, verdicts
from penstock.search.scorers.sandbox import GRADES, Containment

#: Texts that a scorer must survive: not only those who run them.
HOSTILE = (
    "",
    "\0\ud7ff\u202e",
    "raise ValueError(1)",
    "while True: pass",
    "x = [0] * 10 ** 11",
    "import os, time\nfor i in range(20):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(3600)",
    "import os\nos._exit(0)",
    "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda: f()\nf()",
    "print('x' * 10 ** 7)",
    "(" * 10_000,
)

#: A program that writes to PATH what it sees of other processes, or has of capabilities to take off what hides them.
SPY = """
import os
seen = []
for each in filter(str.isdigit, os.listdir("/proc")):
    try:
        seen.append(open(f"/proc/{each}/cmdline").read())
    except OSError:
        pass
foreign = [each for each in seen if each and "harness" not in each and "bwrap" not in each]
able = [line for line in open("/proc/self/status") if line.startswith("CapEff") and int(line.split()[1], 16)]
if foreign or able or not seen:
    open(PATH, "w").write(str(foreign + able))
"""


#: A program that ends the process which judges it, if that can be.
KILLER = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.1)"


def check(scorer: Scorer) -> None:
    """Asserts the law."""
    check_example(scorer)
    check_hostile(scorer)
    check_hidden(scorer)
    check_killer(scorer)


def check_hidden(scorer: Scorer) -> None:
    """Asserts that a text which is run sees no processes but its own, where the machine has namespaces for it."""
    for grade in _contained(scorer):
        example, problem, candidates, _ = scorer.example()
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "told"
            spy = SPY.replace("PATH", repr(str(told)))
            verdicts(example.score, problem, [Candidate(spy, "", finished=False), *candidates], 120)
            seen = told.read_text()[:200] if told.exists() else ""
        assert not seen or grade not in ("bubblewrap", "namespaces"), f"a text sees other processes, or may: {seen}"


def check_killer(scorer: Scorer) -> None:
    """Asserts that a text which is run, and ends what judges it, fails alone."""
    for grade in _contained(scorer):
        example, problem, candidates, wanted = scorer.example()
        killer = Candidate(KILLER, "", finished=False)
        found = verdicts(example.score, problem, [candidates[0], killer, *candidates[1:]], 120)
        scores = [each.score for each in (found[0], *found[2:])]
        assert all(map(math.isclose, scores, wanted)), f"beside a text that kills, in {grade}, the scores are {scores}"
        assert found[1].error or grade != "limits", "a text that ends what judges it has not failed"


def _contained(scorer: Scorer) -> Iterator[str]:
    """The grades of the sandbox that work here, each while it is in force, of a scorer that runs code."""
    for each in map(Containment, GRADES if hasattr(scorer, "limits") else ()):
        if not each.fault():
            with mock.patch.object(sandbox, "containment", return_value=each):
                yield each.grade


def check_example(scorer: Scorer) -> None:
    """Asserts the scores of the policy's example, twice, and in reverse."""
    example, problem, candidates, wanted = scorer.example()
    assert len(candidates) == len(wanted) > 1, "the example has fewer than two texts"
    for given, scores in ((candidates, wanted), (candidates, wanted), (candidates[::-1], wanted[::-1])):
        found = [each.score for each in verdicts(example.score, problem, given, 60)]
        assert all(math.isclose(*pair, abs_tol=1e-9) for pair in zip(found, scores, strict=True)), (
            f"the scores are {found}, and {scores} in the example"
        )


def check_hostile(scorer: Scorer) -> None:
    """Asserts that bad texts fail alone: the example's own, beside them, keep their scores, and nothing is left."""
    example, problem, candidates, wanted = scorer.example()
    limits = getattr(example, "limits", None)
    if limits is not None:
        limits = limits.model_copy(update={"seconds": 1.0})
        example = example.model_copy(update={"limits": limits})
    began, before = time.time(), _descendants()
    # Of scorers that compare texts with each other, unfinished ones are no part of the comparison.
    bad = [Candidate(text, "", finished=False) for text in HOSTILE]
    found = verdicts(example.score, problem, [*bad, *candidates], 120)
    assert len(found) == len(bad) + len(candidates)
    assert all(math.isfinite(each.score) for each in found)
    scores = [each.score for each in found[len(bad) :]]
    assert scores == wanted or all(map(math.isclose, scores, wanted)), f"beside bad texts the scores are {scores}"
    assert all(each.error is None for each in found[len(bad) :]), "a good text fails beside bad ones"
    left = {name for name in _descendants() - before if _begun(name) >= began}
    assert not left, f"processes are left: {left}"


def _descendants() -> set[int]:
    """Processes of sandboxes that this process has begun."""
    return {int(path.name) for path in Path("/proc").glob("[0-9]*") if _mine(path)}


def _mine(path: Path) -> bool:
    try:
        return f"harness-of-{os.getpid()}".encode() in (path / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _begun(process: int) -> float:
    try:
        return Path(f"/proc/{process}").stat().st_mtime
    except OSError:
        return 0.0
