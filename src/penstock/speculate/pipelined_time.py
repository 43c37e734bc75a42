"""How long speculation takes in a pipeline, by the times that its stages take."""

from __future__ import annotations

from collections.abc import Sequence


def pipelined_seconds(
    single: Sequence[float], speculative: Sequence[float], runs: int, tokens: int, accepted: Sequence[int]
) -> float:
    """Seconds until all steps of one text are settled: an event simulation of what
    :class:`~penstock.speculate.drafters.pipelined.Pipelined` does, where exchanges take no time.

    In each step the newest token takes its way through the stages, and speculative runs follow it. When a run is
    through which says that the next token is not what was drafted, the step is settled, and a stage skips those behind
    it that it has not begun. The next step begins then; a stage that is busy with a run of no use ends it first.

    With ``accepted`` all 0 and as many runs as there are stages but one, all of which take the same, this is the time
    of plain decoding, ``len(accepted) * sum(single)``: the first stage has done its last run when the newest token is
    through the last one. Where stages differ, a step may wait for one run in the slowest of them.

    Args:
        single: seconds that each stage takes for the newest token.
        speculative: seconds that each stage takes for a speculative run.
        runs: speculative runs of each step; 0 is plain decoding.
        tokens: of each run.
        accepted: of each step, how many of the drafted tokens are accepted.
    """
    free, now = [0.0] * len(single), 0.0
    for count in accepted:
        last = min(-(-count // tokens), runs)  # that of the last token that is accepted, which says what follows it
        settled = _settled(list(free), now, single, speculative, last)
        arrivals = [now] * (1 + runs)
        for stage in range(len(single)):
            for run, arrival in enumerate(arrivals):
                begun = max(free[stage], arrival)
                if run > last and begun >= settled:
                    arrivals = arrivals[:run]
                    break
                free[stage] = arrivals[run] = begun + (speculative if run else single)[stage]
        now = settled
    return now


def _settled(free: list[float], now: float, single: Sequence[float], speculative: Sequence[float], last: int) -> float:
    """When the run ``last`` of a step that begins ``now`` is through, where stages are ``free`` then."""
    arrivals = [now] * (1 + last)
    for stage in range(len(single)):
        for run, arrival in enumerate(arrivals):
            free[stage] = arrivals[run] = max(free[stage], arrival) + (speculative if run else single)[stage]
    return arrivals[-1]
