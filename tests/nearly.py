"""Whether engines whose kernels round otherwise say nearly the same."""

from __future__ import annotations


def agreement(told: dict[str, list[int]], wanted: dict[str, list[int]], most: int = 8) -> float:
    """Of the first ``most`` tokens of each answer, the share that agrees where all before it did: where two tokens are
    about as probable, answers part ways, and nothing can be said of what comes behind."""
    agreed = parted = 0
    for id, tokens in wanted.items():
        for one, other in zip(told[id][:most], tokens[:most], strict=True):
            agreed, parted = agreed + (one == other), parted + (one != other)
            if one != other:
                break
    return agreed / (agreed + parted)
