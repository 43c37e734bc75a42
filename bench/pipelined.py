"""Speculation in the stages of a pipeline, for one request: beside plain decoding, and beside drafts in one run.

Simulated first, for stages that take a second each, by how many of the drafted tokens are accepted. Then measured, on
two devices (on the CPU two processes): a text that repeats itself, by greedy decoding.
"""

from __future__ import annotations

import contextlib
from typing import Any

from penstock.core.bench import Bench, load
from penstock.core.progress import show
from penstock.models import hub
from penstock.serve.config import EngineConfig
from penstock.serve.opening import open_engine
from penstock.speculate.pipelined_time import pipelined_seconds

STAGES, TOKENS, STEPS = 4, 4, 64
REPETITIONS = 5

#: How the engine drafts.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram": {"draft": {"name": "ngram", "tokens": TOKENS}, "controller": "fixed"},
    "pipelined": {"draft": {"name": "pipelined", "tokens": TOKENS, "run": TOKENS}, "controller": "fixed"},
}


def main(bench: Bench) -> None:
    """Simulates, then measures."""
    for accepted in (0, 1, TOKENS, 2 * TOKENS, 3 * TOKENS):
        bench.compare(
            subject="pipelined",
            peer="plain",
            setting=f"simulated: {STAGES} stages of one second, {accepted} tokens accepted a step",
            metric="throughput",
            unit="tokens/s",
            run=lambda a=accepted: simulated(STAGES - 1, a),
            peer_run=lambda: simulated(0, 0),
            repetitions=1,
        )
    serve = load("serve")
    prompt = [*range(40, 72)] * 2
    tokens = 64 if bench.quick else 256
    work = serve.Workload("one request", [prompt], [tokens], tokens)
    values = {way: measured(bench, way, work) for way in WAYS}
    for peer in ("plain", "ngram"):
        bench.compared(
            subject="pipelined",
            peer=peer,
            setting=f"python-6m on two devices: one request, {len(prompt)} tokens in and {tokens} out",
            metric="throughput",
            unit="tokens/s",
            papers=(10,) if peer == "ngram" else (),
            values=values["pipelined"],
            peer_values=values[peer],
        )


def measured(bench: Bench, way: str, work: Any) -> list[float]:
    """Tokens a second of two stages that draft in this ``way``: a process can be of one pipeline at a time, so that the
    ways cannot take turns."""
    config = EngineConfig.model_validate({"pipeline_parallel": 2, "sequences": 16, "cache_tokens": 8192, **WAYS[way]})
    with contextlib.closing(open_engine(hub.resolve("python-6m"), config, bench.device.type, show)) as engine:
        run = load("serve").run
        run(engine, work)
        return [run(engine, work) for _ in range(REPETITIONS)]


def simulated(runs: int, accepted: int) -> float:
    """Tokens a second where so many are accepted in each step."""
    times = [1.0] * STAGES
    return STEPS * (1 + accepted) / pipelined_seconds(times, times, runs, TOKENS, [accepted] * STEPS)
