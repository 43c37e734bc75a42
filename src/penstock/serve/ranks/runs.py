"""The runs of a step: what of it goes through a pipeline by itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from penstock.serve.run.step import Part, Step


def runs_of(step: Step, tokens: int | None, most: int) -> list[Part]:
    """The runs of ``step``, each a pass over some of its rows: first all that is no draft, and behind it the drafted
    tokens of all sequences, so many ``tokens`` of each in a run, in up to ``most`` runs. One, where nothing is drafted,
    ``tokens`` is None, or what belongs to a pass cannot be cut apart.

    What a run computes sees what is in the cache and what the runs before it have put there, as in one pass.
    """
    part = step.parts[0]
    single = len(step.parts) == 1 and part.copied is None and part.superposed is None and step.asked.parents is None
    if tokens is None or not most or step.asked.window is None or not single:
        return [*step.parts]
    starts = part.plan.starts.numpy()
    owners = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    scored = np.bincount(owners[part.scored], minlength=len(starts) - 1)
    drafted = np.maximum(scored - 1, 0)
    each = max(tokens, -(-int(drafted.max()) // most))
    places = np.arange(len(owners)) - (starts[1:] - drafted)[owners]
    numbers = np.where(places < 0, 0, 1 + places // each)
    return [_cut(part, np.flatnonzero(numbers == number), owners) for number in range(int(numbers.max()) + 1)]


def _cut(part: Part, rows: np.ndarray, owners: np.ndarray) -> Part:
    """The pass over ``rows`` of ``part`` alone, whose sequences ``owners`` says."""
    plan, (own, counts) = part.plan, np.unique(owners[rows], return_counts=True)
    ends = counts.cumsum()
    behind = plan.starts.numpy()[own + 1] - 1 - rows[ends - 1]
    scored = np.isin(part.scored, rows)
    return dataclasses.replace(
        part,
        inputs=part.inputs[:, rows],
        plan=dataclasses.replace(
            plan,
            starts=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            lengths=torch.from_numpy((plan.lengths.numpy()[own] - behind).astype(np.int32)),
            tables=torch.from_numpy(np.ascontiguousarray(plan.tables.numpy()[own])),
            slots=torch.from_numpy(plan.slots.numpy()[rows]),
        ),
        scored=np.searchsorted(rows, part.scored[scored]),
        prompt_logprobs=np.searchsorted(rows, part.prompt_logprobs[np.isin(part.prompt_logprobs, rows)]),
        draws=part.draws[:, scored],
    )
