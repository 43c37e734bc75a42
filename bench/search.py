"""Every program of test-time search on puzzles that are checked: accuracy, tokens and seconds at one budget.

The preset ``puzzles`` trains a small model first. Puzzles are held out by construction; a third each is small Python
functions against tests, Countdown and 4x4 Sudoku. Scorers see what is exactly right, and of a part how much of it is
sound, so this measures how programs spend a budget, not how judges err. The model was trained on puzzles alone: those
programs that put questions to it in words get no sensible reply, and show what their questions cost.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.core.bench import Bench
from penstock.core.config import apply_overrides, build, read_toml
from penstock.core.progress import silent
from penstock.data.puzzles import KINDS, OPERATIONS, puzzles, right
from penstock.data.puzzles import LINE as COUNTED
from penstock.policy import index
from penstock.search.coverage import coverage, power_law
from penstock.search.ledger import Budget
from penstock.search.llm import LLM, Plan, SearchResult, program_of, scoring_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.train import presets
from penstock.train.config import TrainConfig
from penstock.train.run import Run
from penstock.train.session import train_to_the_end

#: Tokens for each problem, about those of eight texts; and the longest text.
BUDGET, LONGEST = 200, 48

#: Samples of each problem for the law of coverage: fitted to the first numbers, and held against the last.
SAMPLES, FITTED = 32, (1, 2, 4, 8, 16)


def trained(folder: Path, changes: list[str]) -> None:
    """A model of the preset, in ``folder``."""
    tree = apply_overrides(read_toml(presets.path_of("puzzles")), changes)
    train_to_the_end(Run.create(build(TrainConfig, tree, "the preset"), folder, report=silent), silent)


def problems(count: int) -> list[dict[str, Any]]:
    """``count`` held-out puzzles of each kind."""
    found = []
    for kind in KINDS:
        unlike: dict[str, dict[str, Any]] = {}
        for puzzle in puzzles(kind, held_out=True):
            unlike.setdefault(puzzle.prompt, {"kind": kind, "prompt": puzzle.prompt, **puzzle.facts})
            if len(unlike) == count:
                break
        found += unlike.values()
    return found


def solves(problem: Mapping[str, Any], text: str) -> bool:
    """Whether ``text`` is right."""
    return right(problem["kind"], dict(problem), text)


def score(problem: Mapping[str, Any], text: str) -> float:
    """1 where ``text`` is right, else up to a half: the share of its lines that are sound."""
    if solves(problem, text):
        return 1.0
    lines = text.strip().splitlines()
    if problem["kind"] == "countdown":
        sound = [_sound(line) for line in lines]
    elif problem["kind"] == "sudoku":
        sound = [
            len(set(line)) == 4 and all(said in (".", found) for said, found in zip(given, line, strict=False))
            for given, line in itertools.zip_longest(problem["given"], lines, fillvalue="")
            if line
        ]
    else:
        sound = [line.startswith("    return") for line in lines]
    return 0.5 * sum(sound) / max(1, len(sound))


def _sound(line: str) -> bool:
    found = COUNTED.fullmatch(line)
    return found is not None and OPERATIONS[found[2]](int(found[1]), int(found[3])) == int(found[4])


def searched(
    llm: LLM, program: Any, asked: list[dict[str, Any]], budget: float | None
) -> tuple[list[SearchResult], float]:
    """Results of all problems, in their order, and the seconds that they took together."""
    plan = Plan(
        program_of(program),
        {"": scoring_of(score)},
        SamplingParams(temperature=0.8, max_tokens=LONGEST, seed=1),
        Budget(amount=budget),
        "\n",
        str.strip,
        models={"strong": llm},
    )
    begun = time.perf_counter()
    found = dict(llm.searched(plan, list(enumerate(asked))))
    return [found[place] for place in range(len(asked))], time.perf_counter() - begun


def main(bench: Bench) -> None:
    """Trains the model, and runs every program on every problem."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "puzzles"
        trained(folder, ["minutes=none", "steps=20"] if bench.quick else [])
        llm = LLM(folder, device=str(bench.device), progress=silent, cache_tokens=16384)
        asked = problems(1 if bench.quick else 6)
        setting = f"{len(asked)} held-out puzzles, {BUDGET} tokens each"
        searched(llm, {"name": "best_of_n", "n": 1}, asked, None)  # warms up
        for name in ["plain sampling", *index().names("search.program")]:
            program = {"name": "best_of_n", "n": 1} if name == "plain sampling" else {"name": name}
            found, seconds = searched(llm, program, asked, BUDGET)
            failed = [each.error for each in found if each.error]
            assert not failed, f"{name} fails: {failed[0]}"
            solved = sum(solves(problem, each.text) for problem, each in zip(asked, found, strict=True))
            spent = sum(each.ledger.generated for each in found)
            figures = (
                ("accuracy", 100 * solved / len(asked), "%", "higher"),
                ("tokens a problem", spent / len(asked), "tokens", "lower"),
                ("time for all", seconds, "s", "lower"),
            )
            for metric, value, unit, better in figures:
                bench.row(
                    subject=name, setting=setting, metric=metric, value=value, unit=unit, better=better, repetitions=1
                )
        covered(bench, llm, asked)


def covered(bench: Bench, llm: LLM, asked: list[dict[str, Any]]) -> None:
    """The law of coverage, fitted to few samples and held against many."""
    found, _ = searched(llm, {"name": "coverage", "n": SAMPLES}, asked, None)
    counts = [(each.notes["samples"], each.notes["right"]) for each in found]
    shares = [coverage(counts, k) for k in FITTED]
    setting = f"{len(asked)} held-out puzzles, {SAMPLES} samples each"
    last = coverage(counts, SAMPLES)
    rows = [(f"coverage of {k}", share) for k, share in zip((*FITTED, SAMPLES), (*shares, last), strict=True)]
    if sum(0 < share < 1 for share in shares) > 1:
        a, b = power_law(FITTED, shares)
        rows.append((f"coverage of {SAMPLES} as exp(a k^b) predicts it from {FITTED[-1]} and fewer", _law(a, b)))
    for metric, share in rows:
        bench.row(
            subject="coverage",
            setting=setting,
            metric=metric,
            value=100 * share,
            unit="%",
            better="higher",
            repetitions=1,
        )


def _law(a: float, b: float) -> float:
    return math.exp(a * SAMPLES**b)
