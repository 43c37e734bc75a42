"""The sandbox from inside: what a text finds of the machine."""

from __future__ import annotations

import pytest

from penstock.search.scorers.contract import Candidate, verdicts
from penstock.search.scorers.sandbox import Limits, grade, sandboxed
from penstock.search.scorers.unit_tests import UnitTests

#: How many processes it can see that are not the sandbox's.
LOOKING = """
def score(problem, text):
    import os
    seen = 0
    for each in filter(str.isdigit, os.listdir("/proc")):
        try:
            said = open(f"/proc/{each}/cmdline", "rb").read()
        except OSError:
            continue
        seen += bool(said) and b"harness" not in said
    return seen
"""

#: What a program that a text begins has, which is where root's would come back.
CAPABLE = """
def score(problem, text):
    import subprocess
    said = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    lines = dict(line.split(":", 1) for line in said.splitlines())
    return int(lines["CapEff"], 16) | int(lines["CapPrm"], 16)
"""


@pytest.mark.skipif(grade() != "namespaces", reason="processes are hidden by namespaces, where bubblewrap is not")
def test_a_function_sees_no_process_but_the_sandboxs_own():
    (found,) = sandboxed("function", LOOKING, {}, [""], Limits())
    assert found.error is None and found.score == 0


def test_a_text_has_no_capabilities():
    (found,) = sandboxed("function", CAPABLE, {}, [""], Limits())
    assert found.error is None and found.score == 0


def test_programs_that_hang_take_no_time_from_others():
    """Five of them take longer than one text may; the right one behind them is scored."""
    hanging, right = "import time\ntime.sleep(60)", "def add(a, b):\n    return a + b"
    scorer = UnitTests(limits=Limits(seconds=0.5))
    given = [Candidate(text, "") for text in [hanging] * 5 + [right]]
    found = verdicts(scorer.score, {"tests": ["assert add(1, 2) == 3"]}, given, 2.0)
    assert [each.error for each in found] == ["it took more than 0.5 s"] * 5 + [None] and found[-1].score == 1
