"""Every program of test-time search on puzzles that are checked: accuracy against the tokens and the seconds it took.

The preset ``puzzles`` trains a small model the first time, ``puzzles-100m`` a larger one on CUDA, on puzzles as hard as
its setting ``hardest`` says. It is kept, and not trained again while preset and puzzles stay as they are. Puzzles are
held out by construction; a quarter each is small Python functions against tests, Countdown, 4x4 and 6x6 Sudoku. Scorers
see what is exactly right, and of a part how much of it is sound, so this measures how programs spend a budget, not how
judges err. Half of the puzzles that the model was trained on were bare, and half were put as programs put them that ask
for a thought first, an outline, the best of drafts, a verdict, tests; programs ask in the words that it knows
(:mod:`penstock.data.puzzle_forms`). Those words are in capitals, which are never drawn.

A program has the engine to itself, and all puzzles at once. Its seconds are those of the whole, from the puzzles to
their answers; the same texts come each time.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.core.bench import Bench
from penstock.core.config import read_toml
from penstock.core.garbage import settled
from penstock.core.progress import silent
from penstock.data import puzzle_forms as forms
from penstock.data.puzzles import KINDS, OPERATIONS, puzzles, right
from penstock.data.puzzles import LINE as COUNTED
from penstock.policy import index
from penstock.search.coverage import coverage, power_law
from penstock.search.ledger import Budget
from penstock.search.llm import LLM, Plan, SearchResult, program_of, scoring_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.decode.roster import Roster
from penstock.train import presets
from penstock.train.kept import kept_run

#: Of each preset, as long as the solutions of its puzzles are: the budget of tokens for a problem, the longest text,
#: and how many tokens the cache holds.
LIMITS = {
    "puzzles": (300, 96, 2**14),
    "puzzles-100m": (400, 128, 2**17),
    "puzzles-experts": (300, 48, 2**14),
}

#: The mixture of experts whose roster chooses tokens, and how many texts of each puzzle it is measured by.
EXPERTS, TEXTS = "puzzles-experts", 8

#: Puzzles of each kind.
COUNT = 16

#: What a part of a text is worth at most, of the 1 that a right one is; and a whole one that is wrong.
PART, WRONG = 0.9, 0.1

#: Samples of each problem for the law of coverage: fitted to the first numbers, and held against the last.
SAMPLES, FITTED = 16, (1, 2, 4, 8)

#: What a program's own name does not say: plain sampling, and REBASE, which ETS is without its prices.
PLAIN, REBASE = "plain sampling", "ets without prices (REBASE)"
PROGRAMS: dict[str, dict[str, Any]] = {
    PLAIN: {"name": "best_of_n", "n": 1},
    REBASE: {"name": "ets", "sharing": 0.0, "diversity": 0.0},
}

#: The words by which programs ask, as the model knows them; and widths that the budget pays for, where a program's own
#: would leave all texts unfinished.
OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive_sampling": {"question": forms.RIGHT, "yes": forms.NO, "no": forms.YES},
    "codemonkeys": {"testing": forms.TESTS, "repair": forms.REPAIR},
    "cot_switch": {"question": forms.HARD, "long": forms.THINK, "short": forms.SKIP},
    "coverage": {"n": 8},
    "dvts": {"trees": 2},
    "elastic": {"opening": forms.THINK, "closing": forms.ANSWER, "thinking": 24},
    "hedged": {"begin": forms.NUMBERED, "choose": forms.WHICH},
    "no_thinking": {"skip": forms.SKIP},
    "outline": {"sketch": forms.OUTLINE, "work": forms.ANSWER},
    "parallel_thoughts": {"begin": forms.THINK, "summarise": forms.BEST},
    "pdr": {"begin": forms.DRAFT, "distil": forms.BEST, "refine": forms.BEST, "improve": forms.BEST},
    "solve_detect_verify": {
        "complete": r"(?!)",
        "question": forms.RIGHT,
        "feedback": forms.RIGHT,
        "again": forms.AGAIN,
    },
}

#: What ETS stands beside; the paper sets it beside the last.
PEERS: dict[str, tuple[int, ...]] = {"beam": (), "dvts": (), REBASE: (321,)}

#: Whose summary reads several texts at once.
THOUGHTS = "parallel_thoughts"

#: Results of all problems, and the seconds that they took.
Run = tuple[list[SearchResult], float]

#: Programs that are said to reach the accuracy of drawing n texts with fewer tokens, and the papers that say so where
#: that is their own baseline.
SAVING: dict[str, tuple[int, ...]] = {"first_finish": (), "adaptive_sampling": (400,), "a_star": (464,)}


def preset_of(bench: Bench) -> str:
    """Whose model searches."""
    return "puzzles" if bench.device.type == "cpu" or bench.quick else "puzzles-100m"


def trained(bench: Bench, preset: str) -> Path:
    """The folder of the model for the device, which is trained where none is kept of these settings and puzzles."""
    changes = [f"device={bench.device}", *(["steps=20"] if bench.quick else [])]
    sources = [Path(inspect.getfile(each)).read_bytes() for each in (puzzles, forms)]
    return kept_run(preset, changes, b"".join(sources))


def opened(bench: Bench, preset: str, **options: Any) -> LLM:
    """The model, with room for the texts of many problems."""
    cache = LIMITS[preset][2]
    return LLM(trained(bench, preset), device=str(bench.device), progress=silent, cache_tokens=cache, **options)


def undrawn(llm: LLM) -> dict[int, float]:
    """What bars the words that ask from being drawn: tokens with capitals in them."""
    capitals = set(string.ascii_uppercase)
    return {token: -100.0 for text, token in llm.tokenizer.get_vocab().items() if capitals & set(text)}


def problems(bench: Bench, preset: str) -> list[dict[str, Any]]:
    """Held-out puzzles of each kind, as hard as those that the model was trained on."""
    hardest = read_toml(presets.path_of(preset))["data"]["corpus"].get("hardest", 1)
    count = hardest if bench.quick else COUNT
    found = []
    for kind in KINDS:
        unlike: dict[str, dict[str, Any]] = {}
        for puzzle in puzzles(kind, held_out=True, hardest=hardest):
            unlike.setdefault(puzzle.prompt, {"kind": kind, "prompt": forms.asked(puzzle), **puzzle.facts})
            if len(unlike) == count:
                break
        found += unlike.values()
    return found


def solution(text: str) -> str:
    """What ``text`` says behind a thought, if it has one."""
    return text.rpartition(forms.ANSWER)[2]


def solves(problem: Mapping[str, Any], text: str) -> bool:
    """Whether ``text`` is right."""
    return right(problem["kind"], dict(problem), solution(text))


def score(problem: Mapping[str, Any], text: str) -> float:
    """1 where ``text`` is right; else the share of its lines that are sound, of what a part or a whole one may be worth
    at most."""
    if solves(problem, text):
        return 1.0
    lines = solution(text).strip().splitlines()
    if not lines:
        return PART
    if problem["kind"] == "countdown":
        whole, sound = len(problem["numbers"]) - 1, [_sound(line) for line in lines]
    elif problem["kind"].startswith("sudoku"):
        whole = len(problem["given"])
        sound = [
            len(set(line)) == len(problem["given"])
            and all(said in (".", found) for said, found in zip(given, line, strict=False))
            for given, line in itertools.zip_longest(problem["given"], lines, fillvalue="")
            if line
        ]
    else:
        whole, sound = 1, [line.lstrip().startswith("return") for line in lines]
    ended = len(lines) >= whole and text.endswith("\n")
    return (WRONG if ended else PART) * sum(sound) / len(sound)


def _sound(line: str) -> bool:
    found = COUNTED.fullmatch(line)
    return found is not None and OPERATIONS[found[2]](int(found[1]), int(found[3])) == int(found[4])


def searched(llm: LLM, plan: Plan, asked: list[dict[str, Any]]) -> list[SearchResult]:
    """Results of all problems, in their order."""
    found = dict(llm.searched(plan, list(enumerate(asked))))
    failed = [each.error for each in found.values() if each.error]
    assert not failed, f"a program fails: {failed[0]}"
    return [found[place] for place in range(len(asked))]


def main(bench: Bench) -> None:
    """Trains the model, and runs every program on every problem."""
    preset = preset_of(bench)
    asked, llm = problems(bench, preset), opened(bench, preset)
    budget, longest, _ = LIMITS[preset]
    barred = undrawn(llm)

    def planned(program: dict[str, Any], amount: float | None) -> Plan:
        return Plan(
            program_of(program),
            {"": scoring_of(score)},
            SamplingParams(temperature=0.8, max_tokens=longest, seed=1, logit_bias=barred),
            Budget(amount=amount),
            "\n",
            str.strip,
            models={"strong": llm},
        )

    def timed(name: str, wanted: list[dict[str, Any]]) -> Run:
        llm.engine.memory.pool.forget()  # what the one before computed is of no use to this one
        found: list[SearchResult] = []
        plan = planned(programmed(name), budget)
        seconds = bench.seconds(lambda: found.extend(searched(llm, plan, wanted)))
        return found, seconds

    samples = searched(llm, planned({"name": "coverage", "n": SAMPLES}, None), asked)
    drawn = covered(bench, samples, asked)
    names, setting = [*PROGRAMS, *index().names("search.program")], setting_of(asked, budget)
    for name in names:  # a puzzle of each kind warms up what a program needs beside the others
        timed(name, asked[:: len(asked) // len(KINDS)])
    with settled():
        turns = {name: functools.partial(timed, name, asked) for name in names}
        runs = bench.turns(turns, setting, repetitions=2, uncounted=0)
    for name, own in runs.items():
        reported(bench, name, setting, asked, own)
    for name, papers in SAVING.items():
        saved(bench, name, papers, setting, asked, runs[name][0][0], drawn)
    for peer, papers in PEERS.items():
        beside(bench, peer, papers, setting, runs)
    summed_up(bench, setting, asked, planned(programmed(THOUGHTS), budget), llm)
    roster(bench)


def programmed(name: str) -> dict[str, Any]:
    """The program that is called so here."""
    return PROGRAMS.get(name, {"name": name, **OPTIONS.get(name, {})})


def summed_up(bench: Bench, setting: str, asked: list[dict[str, Any]], plan: Plan, llm: LLM) -> None:
    """A summary that reads its thoughts where they are in the cache, beside one that has them in its prompt."""
    peer = f"{THOUGHTS} in a row"
    engines = {THOUGHTS: opened(bench, preset_of(bench), kv_reuse="ape"), peer: llm}

    def drawn(engine: LLM) -> Run:
        engine.engine.memory.pool.forget()
        found: list[SearchResult] = []
        seconds = bench.seconds(lambda: found.extend(searched(engine, plan, asked)))
        return found, seconds

    for engine in engines.values():
        drawn(engine)
    with settled():
        turns = {name: functools.partial(drawn, engine) for name, engine in engines.items()}
        runs = bench.turns(turns, setting, repetitions=2, uncounted=0)
    for metric, unit, value, better in (
        (
            "computed tokens a problem",
            "tokens",
            lambda run: sum(each.ledger.computed for each in run[0]) / len(asked),
            "lower",
        ),
        ("accuracy", "%", lambda run: 100 * _accuracy(asked, run[0]), "higher"),
        ("time", "s", lambda run: run[1], "lower"),
    ):
        subject, common = f"{THOUGHTS} beside each other", {"setting": setting, "metric": metric, "unit": unit}
        own, others = ([value(run) for run in runs[name]] for name in (THOUGHTS, peer))
        if all(others):
            bench.compared(subject=subject, peer=peer, values=own, peer_values=others, better=better, **common)
            continue
        for name, values in ((subject, own), (peer, others)):  # of a few puzzles all may be wrong
            bench.measured(subject=name, values=values, better=better, **common)


def roster(bench: Bench) -> None:
    """A mixture of experts beside a roster of its experts [173]: how often a text is right, and the seconds of all."""
    asked, llm = problems(bench, EXPERTS), opened(bench, EXPERTS)
    longest = LIMITS[EXPERTS][1]

    def drawn(rule: Roster | None) -> Run:
        llm.engine.memory.pool.forget()
        found: list[SearchResult] = []
        sampling = SamplingParams(temperature=0.8, max_tokens=longest, seed=1, rule=rule)
        program = program_of({"name": "coverage", "n": TEXTS})
        plan = Plan(program, {"": scoring_of(score)}, sampling, step="\n", answer=str.strip)
        seconds = bench.seconds(lambda: found.extend(searched(llm, plan, asked)))
        return found, seconds

    setting = f"{EXPERTS}: {len(asked)} held-out puzzles, {TEXTS} texts each"
    rules = {"roster": Roster(), "the same model": None}
    for rule in rules.values():
        drawn(rule)
    with settled():
        turns = {name: functools.partial(drawn, rule) for name, rule in rules.items()}
        runs = bench.turns(turns, setting, repetitions=2, uncounted=0)
    shares = {
        name: [100 * sum(each.notes["right"] for each in found) / (TEXTS * len(asked)) for found, _ in own]
        for name, own in runs.items()
    }
    for metric, unit, values, better, papers in (
        ("accuracy of a text", "%", shares, "higher", (173,)),
        ("time", "s", {name: [seconds for _, seconds in own] for name, own in runs.items()}, "lower", ()),
    ):
        ours, theirs = values.values()
        bench.compared(
            subject="roster",
            peer="the same model",
            setting=setting,
            metric=metric,
            unit=unit,
            values=ours,
            peer_values=theirs,
            better=better,
            papers=papers,
        )


def setting_of(asked: list[dict[str, Any]], budget: int) -> str:
    """Under which conditions a program was run."""
    return f"{len(asked)} held-out puzzles, {budget} tokens each"


def reported(bench: Bench, name: str, setting: str, asked: list[dict[str, Any]], runs: list[Run]) -> None:
    """The accuracy of a program, what it took of its budget, and how long that took."""
    found, _ = runs[0]
    for metric, values, unit, better in (
        ("accuracy", [100 * _accuracy(asked, found)], "%", "higher"),
        ("tokens a problem", [_tokens(found)], "tokens", "lower"),
        ("time", [seconds for _, seconds in runs], "s", "lower"),
    ):
        bench.measured(subject=name, setting=setting, metric=metric, unit=unit, values=values, better=better)


def beside(bench: Bench, peer: str, papers: tuple[int, ...], setting: str, runs: Mapping[str, list[Run]]) -> None:
    """The most blocks of the cache that ETS held for a problem, and its speed, beside those of ``peer``."""
    for metric, unit, value, better in (
        ("blocks held", "blocks", lambda run: _blocks(run[0]), "lower"),
        ("throughput", "tokens/s", lambda run: len(run[0]) * _tokens(run[0]) / run[1], "higher"),
    ):
        bench.compared(
            subject="ets",
            peer=peer,
            setting=setting,
            metric=metric,
            unit=unit,
            values=[value(run) for run in runs["ets"]],
            peer_values=[value(run) for run in runs[peer]],
            better=better,
            papers=papers,
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
    setting: str,
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
        setting=setting,
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
    for k in (*FITTED, SAMPLES):
        bench.row(subject="coverage", setting=setting, metric=f"coverage of {k}", value=100 * shares[k], unit="%")
    fitted = [shares[k] for k in FITTED]
    if sum(0 < share < 1 for share in fitted) > 1:
        a, b = power_law(FITTED, fitted)
        told, predicted = f"exp(a k^b) of {FITTED[-1]} and fewer", math.exp(a * SAMPLES**b)
        for metric, share in (
            (f"coverage of {SAMPLES} by {told}", predicted),
            (f"error of {told} at {SAMPLES}", abs(predicted - shares[SAMPLES])),
        ):
            bench.row(subject="coverage", setting=setting, metric=metric, value=100 * share, unit="%")
    if shares[1]:
        bench.compared(
            subject="coverage",
            peer="one sample",
            setting=setting,
            metric=f"right within {SAMPLES} samples",
            unit="%",
            values=[100 * shares[SAMPLES]],
            peer_values=[100 * shares[1]],
            papers=(314,),
        )
    each = _tokens(found) / SAMPLES
    return [(share, k * each) for k, share in shares.items()]
