"""Searches a file of problems in child processes that are killed at random instants, until enough have died; then lets
one finish. Children are forked from this process, which has loaded everything.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

from children import born, running
from penstock.core.files import claim
from penstock.core.randomness import numpy_generator
from penstock.search.llm import LLM, Plan
from penstock.search.problems import read_problems
from penstock.search.runs import Results


def live(llm: LLM, plan: Plan, source: Path, folder: Path) -> None:
    """What a child does: begins or continues the search, to its end."""
    tables = read_problems(source)
    folder.mkdir(exist_ok=True)
    with claim(folder):
        results = Results(folder, {"problems": str(source)})
        left = [(place, table) for place, table in enumerate(tables) if place not in results.done]
        for place, result in llm.searched(plan, left):
            results.write(place, result.record())
        results.close()


def kill(llm: LLM, plan: Plan, source: Path, folder: Path, deaths: int) -> list[list[bytes]]:
    """Kills ``deaths`` children at instants drawn uniformly after their first new line; then one ends by itself.

    Returns the whole lines that the results had at each death.
    """
    draw, kept = numpy_generator(0, "deaths"), []
    life = functools.partial(live, llm, plan, source, folder)
    target = folder / "results.jsonl"
    for _ in range(deaths):
        before = target.stat().st_size if target.exists() else 0
        child = born(life)
        while running(child) and (not target.exists() or target.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept.append([line for line in target.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")])
    _, status = os.waitpid(born(life), 0)
    assert status == 0, "the search that nobody killed has failed"
    return kept
