"""A crowd that must be preempted again and again."""

from __future__ import annotations

from penstock.core.randomness import numpy_generator
from penstock.serve.choose.sampling import SamplingParams
from penstock.testing.engine.machine import EngineMachine
from penstock.testing.engine.requests import MOST, PREFIXES, TAILS


def crowd(machine: EngineMachine, seed: int) -> None:
    """Plays on ``machine`` a crowd on a pool so small that sequences are preempted, also amidst their prompts."""
    draw = numpy_generator(seed, "testing/crowding")
    machine.open(
        loop=seed,
        tokens=int(draw.choice([10, 24])),
        sequences=int(draw.choice([4, 10])),
        block_size=int(draw.choice([2, 4])),
        cache=int(draw.choice([36, 48, 60])),
        draft=seed,
        eviction=seed,
        places=(0, 3, 40)[seed % 3],
    )
    for number in range(10):
        for _ in range(int(draw.integers(3))):
            prompt = PREFIXES[int(draw.integers(2))][: int(draw.integers(24))] + TAILS[int(draw.integers(3))]
            sampling = SamplingParams(
                temperature=float(draw.integers(2)),
                seed=number,
                max_tokens=MOST,
                ignore_eos=True,
                prompt_logprobs=int(draw.integers(2)) or None,
            )
            machine.arrive(asked=[(prompt[: machine.engine.limits.context - 1], sampling)], deadline=None)
        machine.step(times=int(draw.integers(1, 5)))
    machine.teardown()
