"""Every program of test-time search on puzzles that are checked: accuracy and tokens within a budget.

The preset ``puzzles`` trains a small model the first time, ``puzzles-100m`` a larger one on CUDA. It is kept, and not
trained again while preset and puzzles stay as they are. Puzzles are held out by construction; a quarter each is small
Python functions against tests, Countdown, 4x4 and 6x6 Sudoku. Scorers see what is exactly right, and of a part how much
of it is sound, so this measures how programs spend a budget, not how judges err. The model was trained on puzzles
alone: those programs that put questions to it in words get no sensible reply, and show what their questions cost.
Nothing is timed (``search_live`` does that), so on a CPU programs run side by side, one a core.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from penstock.core.bench import Bench, load
from penstock.core.progress import silent
from penstock.data.puzzles import KINDS, OPERATIONS, puzzles, right
from penstock.data.puzzles import LINE as COUNTED
from penstock.policy import index
from penstock.search.coverage import coverage, power_law
from penstock.search.ledger import Budget
from penstock.search.llm import LLM, Plan, SearchResult, program_of, scoring_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.train.kept import kept_run

#: Budgets of tokens for each problem; and the longest text.
BUDGETS, LONGEST = (200,), 48

#: Puzzles of each kind.
COUNT = 16

#: Samples of each problem for the law of coverage: fitted to the first numbers, and held against the last.
SAMPLES, FITTED = 16, (1, 2, 4, 8)

#: Programs that are said to reach the accuracy of drawing n texts with fewer tokens, and the papers that say so where
#: that is their own baseline.
SAVING: dict[str, tuple[int, ...]] = {"first_finish": (), "adaptive_sampling": (400,), "a_star": (464,)}


def trained(bench: Bench) -> Path:
    """The folder of the model for the device, which is trained where none is kept of these settings and puzzles."""
    changes = [f"device={bench.device}", *(["steps=20"] if bench.quick else [])]
    preset = "puzzles" if bench.device.type == "cpu" or bench.quick else "puzzles-100m"
    return kept_run(preset, changes, Path(inspect.getfile(puzzles)).read_bytes())


def problems(count: int) -> list[dict[str, Any]]:
    """``count`` held-out puzzles of each kind."""
    found = []
    for kind in KINDS:
        unlike: dict[str, dict[str, Any]] = {}
        for puzzle in puzzles(kind, held_out=True):
            # The end of a function's line and the indent behind it are one token: a prompt ends before it.
            asked = puzzle.prompt.rstrip("\n") if kind == "functions" else puzzle.prompt
            unlike.setdefault(puzzle.prompt, {"kind": kind, "prompt": asked, **puzzle.facts})
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
    elif problem["kind"].startswith("sudoku"):
        sound = [
            len(set(line)) == len(problem["given"])
            and all(said in (".", found) for said, found in zip(given, line, strict=False))
            for given, line in itertools.zip_longest(problem["given"], lines, fillvalue="")
            if line
        ]
    else:
        sound = [line.lstrip().startswith("return") for line in lines]
    return 0.5 * sum(sound) / max(1, len(sound))


def _sound(line: str) -> bool:
    found = COUNTED.fullmatch(line)
    return found is not None and OPERATIONS[found[2]](int(found[1]), int(found[3])) == int(found[4])


def searched(llm: LLM, program: Any, asked: list[dict[str, Any]], budget: float | None) -> list[SearchResult]:
    """Results of all problems, in their order."""
    plan = Plan(
        program_of(program),
        {"": scoring_of(score)},
        SamplingParams(temperature=0.8, max_tokens=LONGEST, seed=1),
        Budget(amount=budget),
        "\n",
        str.strip,
        models={"strong": llm},
    )
    found = dict(llm.searched(plan, list(enumerate(asked))))
    return [found[place] for place in range(len(asked))]


@functools.cache
def opened(folder: Path, device: str) -> LLM:
    """The model, once in each process."""
    if device == "cpu":
        torch.set_num_threads(1)
    return LLM(folder, device=device, progress=silent, cache_tokens=16384)


def played(
    folder: Path, device: str, program: dict[str, Any], asked: list[dict[str, Any]], budget: float | None
) -> list[SearchResult]:
    """:func:`searched`, with the model of this process."""
    return searched(opened(folder, device), program, asked, budget)


def main(bench: Bench) -> None:
    """Trains the model, and runs every program on every problem."""
    asked, folder = problems(1 if bench.quick else COUNT), trained(bench)
    names = ["plain sampling", *index().names("search.program")]
    each = functools.partial(played, folder, str(bench.device))
    found: dict[tuple[str, int], list[SearchResult]] = {}
    with ProcessPoolExecutor(
        torch.get_num_threads() if bench.device.type == "cpu" else 1,
        multiprocessing.get_context("spawn"),
        load,
        ("search",),  # the other processes know this script by its name then
    ) as processes:
        samples = processes.submit(each, {"name": "coverage", "n": SAMPLES}, asked, None)
        runs = {
            (name, budget): processes.submit(
                each, {"name": "best_of_n", "n": 1} if name == "plain sampling" else {"name": name}, asked, budget
            )
            for name, budget in itertools.product(names, BUDGETS)
        }
        drawn = covered(bench, samples.result(), asked)
        for (name, budget), run in runs.items():
            found[name, budget] = run.result()
            reported(bench, name, asked, budget, found[name, budget])
    for name, papers in SAVING.items():
        saved(bench, name, papers, asked, found[name, BUDGETS[-1]], drawn)
    for peer in ("beam", "dvts"):
        bench.compared(
            subject="ets",
            peer=peer,
            setting=setting_of(asked, BUDGETS[-1]),
            metric="blocks held",
            unit="blocks",
            values=[_blocks(found["ets", BUDGETS[-1]])],
            peer_values=[_blocks(found[peer, BUDGETS[-1]])],
            better="lower",
        )


def setting_of(asked: list[dict[str, Any]], budget: int) -> str:
    """Under which conditions a program was run."""
    return f"{len(asked)} held-out puzzles, {budget} tokens each"


def reported(bench: Bench, name: str, asked: list[dict[str, Any]], budget: int, found: list[SearchResult]) -> None:
    """The accuracy of a program, and what it took of its budget."""
    failed = [each.error for each in found if each.error]
    assert not failed, f"{name} fails: {failed[0]}"
    for metric, value, unit, better in (
        ("accuracy", 100 * _accuracy(asked, found), "%", "higher"),
        ("tokens a problem", _tokens(found), "tokens", "lower"),
    ):
        bench.row(
            subject=name,
            setting=setting_of(asked, budget),
            metric=metric,
            value=value,
            unit=unit,
            better=better,
        )


def _accuracy(asked: list[dict[str, Any]], found: list[SearchResult]) -> float:
    return sum(solves(problem, each.text) for problem, each in zip(asked, found, strict=True)) / len(asked)


def _tokens(found: list[SearchResult]) -> float:
    return sum(each.ledger.generated for each in found) / len(found)


def _blocks(found: list[SearchResult]) -> float:
    return sum(each.ledger.blocks for each in found) / len(found)


def saved(
    bench: Bench,
    name: str,
    papers: tuple[int, ...],
    asked: list[dict[str, Any]],
    found: list[SearchResult],
    drawn: list[tuple[float, float]],
) -> None:
    """The tokens that a program took beside those that drawing n texts takes to the same accuracy, for whichever n that
    is, with the best of them known; ``drawn`` has accuracy and tokens of each n. Nothing where no n comes to it."""
    accuracy = _accuracy(asked, found)
    reached = [place for place, (covered, _) in enumerate(drawn) if covered >= accuracy]
    if not reached or not accuracy:
        return
    (_, most), (_, least) = drawn[reached[0]], drawn[max(0, reached[0] - 1)]
    (high, low) = drawn[reached[0]][0], drawn[max(0, reached[0] - 1)][0]
    needed = most if high == low else least + (most - least) * max(0.0, accuracy - low) / (high - low)
    bench.compared(
        subject=name,
        peer="best of as many texts as that takes",
        setting=setting_of(asked, BUDGETS[-1]),
        metric=f"tokens to {100 * accuracy:.0f}% right",
        unit="tokens",
        values=[_tokens(found)],
        peer_values=[needed],
        better="lower",
        papers=papers,
    )


def covered(bench: Bench, found: list[SearchResult], asked: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The law of coverage, fitted to few samples and held against many, of texts that were ``found``. What n samples
    cover, from 1 on, with the tokens that they take."""
    counts = [(each.notes["samples"], each.notes["right"]) for each in found]
    shares = {k: coverage(counts, k) for k in range(1, SAMPLES + 1)}
    setting = f"{len(asked)} held-out puzzles, {SAMPLES} samples each"
    rows = [(f"coverage of {k}", shares[k]) for k in (*FITTED, SAMPLES)]
    fitted = [shares[k] for k in FITTED]
    if sum(0 < share < 1 for share in fitted) > 1:
        a, b = power_law(FITTED, fitted)
        predicted = math.exp(a * SAMPLES**b)
        rows.append((f"coverage of {SAMPLES} as exp(a k^b) predicts it from {FITTED[-1]} and fewer", predicted))
    for metric, share in rows:
        bench.row(subject="coverage", setting=setting, metric=metric, value=100 * share, unit="%")
    each = _tokens(found) / SAMPLES
    return [(share, k * each) for k, share in shares.items()]
