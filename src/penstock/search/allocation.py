"""How an inference budget of retrieval is shared out: a model of accuracy over documents, shots and rounds ([345])."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from penstock.core.errors import UsageError
from penstock.policy import create
from penstock.search.programs.retrieval import Retrieval
from penstock.search.runs import read_results

#: (documents k, shots m, rounds n).
Setting = tuple[int, int, int]

#: How much a document and a shot of this task tell.
Informativeness = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """log(P / (1 - P)) = (a + b * i) . log(k + 1, m + 1, n + 1) + c, where P is the accuracy with k documents, m shots
    and n rounds, and i has the informativeness of documents and shots, and 0 for rounds ([345]; the form is from
    knowledge; the ones that are added, so that 0 can be had of each, are ours).

    Attributes:
        a: of each of the three.
        b: of the two that are informative.
        c: where there is nothing.
    """

    a: tuple[float, float, float]
    b: tuple[float, float]
    c: float

    def accuracy(self, setting: Setting, informativeness: Informativeness) -> float:
        """The accuracy that is predicted."""
        weights = [*self.a, *self.b, self.c]
        return float(1 / (1 + np.exp(-_row(setting, informativeness) @ np.array(weights))))

    def best(
        self,
        settings: Iterable[Setting],
        informativeness: Informativeness,
        cost: Callable[[Setting], float],
        budget: float,
    ) -> Setting:
        """The setting with the highest predicted accuracy of those that cost no more than ``budget``; of equals, the
        cheapest.

        Raises:
            ValueError: all cost more.
        """
        found = [each for each in settings if cost(each) <= budget]
        if not found:
            raise ValueError(f"no setting costs {budget:g} or less")
        return max(found, key=lambda each: (self.accuracy(each, informativeness), -cost(each)))


def fit(seen: Sequence[tuple[Setting, Informativeness, float]]) -> Allocation:
    """The allocation model that fits accuracies by least squares of their logits; accuracies of 0 and 1 say nothing,
    and are left out.

    Raises:
        ValueError: what was seen does not tell all of its parts.
    """
    said = [each for each in seen if 0 < each[2] < 1]
    rows = np.array([_row(setting, informativeness) for setting, informativeness, _ in said]).reshape(-1, 6)
    logits = np.array([np.log(accuracy / (1 - accuracy)) for _, _, accuracy in said])
    # Of one task alone, what its documents tell cannot be told from what documents are.
    used = np.ones(6, bool)
    if len({informativeness for _, informativeness, _ in said}) < 2:
        used[3:5] = False
    if np.linalg.matrix_rank(rows[:, used]) < used.sum():
        raise ValueError("settings that differ in documents, shots and rounds are needed, of several tasks or of one")
    weights = np.zeros(6)
    weights[used] = np.linalg.lstsq(rows[:, used], logits, rcond=None)[0]
    k, m, n, informed_k, informed_m, c = weights.tolist()
    return Allocation((k, m, n), (informed_k, informed_m), c)


def _row(setting: Setting, informativeness: Informativeness) -> np.ndarray:
    logs = np.log1p(np.array(setting, float))
    return np.concatenate([logs, logs[:2] * np.array(informativeness), [1.0]])


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run of ``retrieval`` came to: which share of its ``problems`` are right, and the tokens that one costs."""

    setting: Setting
    accuracy: float
    tokens: float
    problems: int

    @property
    def expected(self) -> float:
        """What share of other problems will be right, which is neither all nor none of them: that of one problem more,
        half of which is right (Jeffreys' prior; ours)."""
        return (self.accuracy * self.problems + 0.5) / (self.problems + 1)


def seen_in(folders: Sequence[Path], right: float = 1.0) -> list[Seen]:
    """What the runs of ``penstock search --program retrieval`` in ``folders`` came to. A problem is right where its
    score is ``right`` or more; its cost are the tokens that were computed for it.

    Raises:
        UsageError: a folder has none, or none with a scorer, or one of other problems.
    """
    found, first = [], None
    for folder in folders:
        settings, records = read_results(folder)
        options = dict(settings["program"])
        if options.pop("name") != "retrieval" or any(each["score"] is None or each["error"] for each in records):
            raise UsageError(
                f"{folder} does not say what a setting of retrieval comes to",
                hint="Run penstock search with --program retrieval and a --scorer.",
            )
        if first not in (None, (settings["problems"], len(records))):
            raise UsageError(f"{folder} has the results of other problems than {folders[0]}")
        first = settings["problems"], len(records)
        program = create("search.program", "retrieval", **options)
        assert isinstance(program, Retrieval)
        accuracy = sum(each["score"] >= right for each in records) / len(records)
        tokens = sum(each["ledger"]["tokens"] for each in records) / len(records)
        found.append(Seen((program.documents, program.shots, program.rounds), accuracy, tokens, len(records)))
    return found


def combined(seen: Sequence[Seen]) -> list[Setting]:
    """All combinations of the documents, shots and rounds that were ``seen``."""
    return list(itertools.product(*(sorted(set(each)) for each in zip(*(one.setting for one in seen), strict=True))))


def costs(seen: Sequence[Seen]) -> Callable[[Setting], float]:
    """The tokens of a setting: those that were seen, else the least squares of them by a price of each document, shot
    and round, and of what there is without (ours)."""
    known = {each.setting: each.tokens for each in seen}
    rows = np.array([[*setting, 1] for setting in known], float)
    prices = np.linalg.lstsq(rows, np.array(list(known.values())), rcond=None)[0]
    return lambda setting: known.get(setting, float(np.array([*setting, 1]) @ prices))
