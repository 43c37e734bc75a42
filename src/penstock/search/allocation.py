"""How an inference budget of retrieval is shared out: a model of accuracy over documents, shots and rounds ([345])."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

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
