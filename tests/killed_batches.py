"""Answers a batch file in child processes that are killed at random instants, until enough have died; then lets one
finish. Children are forked from this process, which has loaded everything, so that a life costs milliseconds.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path

import torch

from children import born, running
from penstock import LLM
from penstock.core.randomness import numpy_generator
from penstock.ops.paged.invariant import Invariant
from penstock.serve.http.text import Tokens
from penstock.serve.offline.batch_file import BatchRun
from penstock.serve.offline.gather import Gatherer


def engine() -> LLM:
    """A small one, not used yet. What a killed life leaves undone is answered in other batches: without a compiler for
    the deterministic engine, a draw at the very edge between two tokens may fall otherwise there."""
    torch.set_num_threads(1)
    same = Invariant().serves(torch.device("cpu"), torch.float32, 16) is None
    return LLM(
        "python-1m",
        device="cpu",
        batching="batchllm",
        sequences=4,
        tokens=64,
        cache_tokens=2048,
        deterministic=same,
    )


def live(llm: LLM, source: Path, target: Path) -> None:
    """What a child does: begins or continues the batch, to its end."""
    BatchRun(
        Gatherer(llm.engine, llm.tokenizer),
        Tokens(llm.tokenizer),
        "python-1m",
        16,
    ).run(source, target)


def kill(llm: LLM, source: Path, target: Path, deaths: int) -> list[int]:
    """Kills ``deaths`` children at instants drawn uniformly after their first new line; then one ends by itself.

    Returns how many whole lines the output had at each death.
    """
    draw, counts = numpy_generator(0, "deaths"), []
    life = functools.partial(live, llm, source, target)
    for _ in range(deaths):
        before = target.stat().st_size if target.exists() else 0
        child = born(life)
        while running(child) and (not target.exists() or target.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts.append(target.read_bytes().count(b"\n"))
    _, status = os.waitpid(born(life), 0)
    assert status == 0, "the batch that nobody killed has failed"
    return counts
