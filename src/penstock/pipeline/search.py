"""The fastest schedules under a memory limit, among all registered ones, their options and transforms."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from penstock.core.errors import ConfigError, UsageError
from penstock.core.progress import Reporter, silent
from penstock.pipeline.ir.refusal import RefusalError
from penstock.pipeline.ir.schedule import WeightRule
from penstock.pipeline.schedules.contract import PipelineSchedule
from penstock.pipeline.simulate.simulator import Simulation, simulate
from penstock.pipeline.simulate.times import StagesError, Times
from penstock.pipeline.transforms.contract import PipelineTransform
from penstock.policy import create, index, lookup


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A schedule and perhaps a transform of it, simulated.

    ``label`` is its name as on the command line, with the options that are not the defaults.
    """

    label: str
    simulation: Simulation

    @property
    def peak(self) -> float:
        """The most bytes of activations on a device."""
        return max(self.simulation.peak_bytes)


def search(
    devices: int, microbatches: int, times: Times, memory: float, reporter: Reporter = silent
) -> list[Candidate]:
    """All candidates of which no device holds more than ``memory``, the fastest first, then the leanest.

    Each whole-number option of a schedule is tried at its default, twice and four times that. Schedules that refuse
    these numbers, are of other numbers of stages than ``times``, or have no flush are left out; so are transforms that
    change nothing.

    Raises:
        UsageError: nothing fits, and then how much would; or the numbers make no pipeline.
    """
    found: list[Candidate] = []
    pairs = list(itertools.product(_schedules(times, memory), _transforms(times, memory)))
    with reporter("searching", len(pairs), "schedule") as bar:
        for schedule, transform in pairs:
            found += _simulated(schedule, transform, devices, microbatches, times)
            bar.advance()
    fitting = [candidate for candidate in found if candidate.peak <= memory * (1 + 1e-9)]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.peak, default=None)
        raise UsageError(
            f"no schedule of {devices} devices and {microbatches} microbatches holds within {memory:g}",
            hint=f"{least.label} holds least: {least.peak:g}." if least else "",
        )
    return sorted(fitting, key=lambda candidate: (candidate.simulation.makespan, candidate.peak, candidate.label))


def _simulated(
    schedule: PipelineSchedule, transform: PipelineTransform | None, devices: int, microbatches: int, times: Times
) -> Iterator[Candidate]:
    try:
        plain = schedule.build(devices, microbatches)
        if plain.weights is not WeightRule.FLUSH:
            return
        built = plain if transform is None else transform.apply(plain)
        if transform is not None and built == plain:
            return
        yield Candidate(_label(schedule, transform), simulate(built, times.costs(built)))
    except (RefusalError, StagesError):
        return


def _schedules(times: Times, memory: float) -> Iterator[PipelineSchedule]:
    """All schedules with their options; those that plan by times and memory get these."""
    for name in index().names("pipeline.schedule"):
        fields = lookup("pipeline.schedule", name).model_fields
        whole = {field: info.default for field, info in fields.items() if info.annotation is int}
        for factor in (1, 2, 4) if whole else (1,):
            options = {field: factor * value for field, value in whole.items()}
            with contextlib.suppress(ConfigError):  # one that plans by memory may want more than there is
                policy = create("pipeline.schedule", name, **options, **_planned(fields, times, memory))
                assert isinstance(policy, PipelineSchedule)
                yield policy


def _transforms(times: Times, memory: float) -> Iterator[PipelineTransform | None]:
    yield None
    for name in index().names("pipeline.transform"):
        fields = lookup("pipeline.transform", name).model_fields
        policy = create("pipeline.transform", name, **_planned(fields, times, memory))
        assert isinstance(policy, PipelineTransform)
        yield policy


def _planned(fields: Iterable[str], times: Times, memory: float) -> dict[str, Any]:
    return {field: value for field, value in {"times": times.model_dump(), "memory": memory}.items() if field in fields}


def _label(schedule: PipelineSchedule, transform: PipelineTransform | None) -> str:
    options = (
        f"{field}={value}"
        for field, value in schedule
        if field not in ("times", "memory") and value != type(schedule).model_fields[field].default
    )
    label = " ".join([schedule.policy_name, *options])
    return label if transform is None else f"{label} + {transform.policy_name}"
