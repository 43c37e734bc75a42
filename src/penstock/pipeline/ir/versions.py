"""Which version of its stage's weights each task sees, and how many a device holds."""

from __future__ import annotations

from collections import defaultdict

from penstock.pipeline.ir.schedule import VOCABULARY, Kind, Schedule, WeightRule


def versions(schedule: Schedule) -> list[list[int]]:
    """For each device, the version that each task of its list sees: the updates of its stage until then.

    With a flush it is version 0 throughout. With stashing, a stage updates once it has done B or W of a microbatch, and
    the backward of a microbatch sees what its forward saw. Replicas of a stage average the gradients of a round, one
    microbatch each, so that a round is one update of all of them.
    """
    if schedule.weights is WeightRule.FLUSH:
        return [[0] * len(order) for order in schedule.orders]
    seen = []
    for order in schedule.orders:
        updates: defaultdict[int, int] = defaultdict(int)
        stashed: dict[tuple[int, int], int] = {}
        own = []
        for kind, stage, microbatch, _ in order:
            if kind is Kind.F:
                stashed[stage, microbatch] = updates[stage]
            own.append(stashed[stage, microbatch])
            if kind in (Kind.W, Kind.B):
                updates[stage] += 1
        seen.append(own)
    return seen


def peak_versions(schedule: Schedule) -> list[int]:
    """For each device, the most versions of weights, of one stage each, that it holds at once while it works.

    A version is held while it is the newest, or a microbatch is between its forward and its backward with it.
    """
    peaks = []
    for order, seen in zip(schedule.orders, versions(schedule), strict=True):
        newest = {task.stage: 0 for task in order if task.kind not in VOCABULARY}
        users: defaultdict[tuple[int, int], int] = defaultdict(int)
        peak = len(newest)
        for (kind, stage, *_), version in zip(order, seen, strict=True):
            if kind is Kind.F:
                users[stage, version] += 1
            elif kind in (Kind.W, Kind.B):
                users[stage, version] -= 1
                if not users[stage, version]:
                    del users[stage, version]
                if schedule.weights is WeightRule.STASH:
                    newest[stage] += 1
            peak = max(peak, len(users.keys() | newest.items()))
        peaks.append(peak)
    return peaks
