"""The states of several engines as one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from penstock.serve.link.wire import Ready
from penstock.serve.messages import ReplicaState, Snapshot

#: Figures that are no sums.
OTHERS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "step_seconds": max,
    "version": max,
    "paused": all,
    "asleep": all,
    "policy": lambda each: each[0],
    "adapters": lambda each: (),
    "adapter_keys": lambda each: (),
    "replicas": lambda each: (),
}


def summed(states: Sequence[Snapshot]) -> Snapshot:
    """What ``states``, one or more, come to: counts are added up, place by place where they are lists; of the durations
    of steps it is the longest. Of adapters nothing is told: an engine may have one that the others have not yet."""
    found = {}
    for field in dataclasses.fields(Snapshot):
        values = [getattr(state, field.name) for state in states]
        if field.name in OTHERS:
            found[field.name] = OTHERS[field.name](values)
        elif isinstance(values[0], tuple):
            found[field.name] = tuple(map(sum, itertools.zip_longest(*values, fillvalue=0)))
        else:
            found[field.name] = sum(values)
    return Snapshot(**found)


def described(replicas: Sequence[ReplicaState]) -> list[dict[str, Any]]:
    """What is told of ``replicas``, without the figures of their engines."""
    return [
        {"replica": number, "state": each.state, "under_way": each.under_way, "restarts": each.restarts}
        for number, each in enumerate(replicas)
    ]


def all_ready(each: Sequence[Ready]) -> Ready:
    """What engines with the same model say of themselves together; the ``memory`` has the ranks of the first one, then
    those of the next."""
    return dataclasses.replace(
        each[0],
        context=min(ready.context for ready in each),
        sequences=sum(ready.sequences for ready in each),
        memory=[memory for ready in each for memory in ready.memory],
    )
