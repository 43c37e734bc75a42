"""Who sees whom among the new tokens of a sequence, where they are not simply in a row."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Masks(NamedTuple):
    """The masks of the S sequences of a batch that are not causal.

    The mask of a sequence is over its last new tokens. All that is before them, in the cache or new, is causal, and is
    seen by each of them.

    Attributes:
        sequences: int64 [S], their numbers in the batch, ascending.
        counts: int64 [S], over how many tokens each mask is.
        before: int64 [S], how many tokens of the sequence are before those.
        offsets: int64 [S + 1], where the matrix of each mask begins in ``seen``, and behind the last.
        seen: bool, the matrices end to end; in each, row i says which of its tokens token i sees.
        positions: int64 [N], of all tokens of the batch.
    """

    sequences: np.ndarray
    counts: np.ndarray
    before: np.ndarray
    offsets: np.ndarray
    seen: np.ndarray
    positions: np.ndarray

    def matrix(self, index: int) -> np.ndarray:
        """That of sequence ``sequences[index]``: bool [count, count]."""
        count = int(self.counts[index])
        return self.seen[self.offsets[index] : self.offsets[index + 1]].reshape(count, count)


def masks_of(starts: np.ndarray, lengths: np.ndarray, parents: np.ndarray | None, open_: np.ndarray | None) -> Masks:
    """What the fields of a :class:`~penstock.ops.paged.contract.PagedBatch` ask for.

    Raises:
        ValueError: they contradict themselves or the batch.
    """
    starts = starts.astype(np.int64)
    counts = np.diff(starts)
    owner = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(starts[-1]) - starts[owner]  # among the new tokens of the own sequence
    parents = places - 1 if parents is None else parents.astype(np.int64)
    opened = np.zeros_like(counts) if open_ is None else open_.astype(np.int64)
    branching = _check(owner, places, counts, parents, opened)

    # Tokens that are in a row, and that no later token bypasses, are as good as cached.
    trunk = np.where(opened > 1, counts - opened, counts)
    np.minimum.at(trunk, owner[branching], parents[branching] + 1)
    sizes, before = counts - trunk, lengths - counts
    sequences = np.flatnonzero(sizes)
    offsets = np.concatenate([[0], (sizes**2).cumsum()])
    seen = np.zeros(offsets[-1], bool)
    positions = before[owner] + places
    for sequence in np.flatnonzero(opened > 1):
        seen[offsets[sequence] : offsets[sequence + 1]] = True

    # All tokens of trees go up towards the root at the same time, a generation at each turn.
    rows = np.flatnonzero((places >= trunk[owner]) & (opened[owner] <= 1))
    current = rows
    positions[rows] = (before + trunk)[owner[rows]] - 1
    while len(rows):
        own = owner[rows]
        first = starts[own] + trunk[own]
        seen[offsets[own] + (rows - first) * sizes[own] + (current - first)] = True
        positions[rows] += 1
        inside = parents[current] >= trunk[own]
        rows, current = rows[inside], (starts[own] + parents[current])[inside]
    kept = offsets[sequences]
    return Masks(
        sequences, sizes[sequences], (before + trunk)[sequences], np.append(kept, offsets[-1]), seen, positions
    )


def _check(
    owner: np.ndarray, places: np.ndarray, counts: np.ndarray, parents: np.ndarray, opened: np.ndarray
) -> np.ndarray:
    """Which tokens do not follow the one before them: bool [N]. Refuses what cannot be meant."""
    if parents.shape != places.shape or opened.shape != counts.shape:
        raise ValueError(
            f"masks of {len(parents)} tokens and {len(opened)} sequences do not fit "
            f"a batch of {len(places)} and {len(counts)}"
        )
    wrong = np.flatnonzero((parents < -1) | (parents >= places))
    if wrong.size:
        token = wrong[0]
        raise ValueError(
            f"token {places[token]} of sequence {owner[token]} has the parent {parents[token]}: "
            "it must be an earlier new token of its sequence, or -1"
        )
    wrong = np.flatnonzero((opened < 0) | (opened > counts))
    if wrong.size:
        raise ValueError(f"sequence {wrong[0]} has {counts[wrong[0]]} new tokens, and {opened[wrong[0]]} of them open")
    branching: np.ndarray = parents != places - 1
    both = np.flatnonzero(branching & (opened[owner] > 1))
    if both.size:
        raise ValueError(f"sequence {owner[both[0]]} has both a tree and open tokens")
    return branching
