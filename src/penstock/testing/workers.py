"""Processes of one host that a benchmark gives orders to, one order at a time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from penstock.core.errors import PenstockError
from penstock.parallel.world import World
from penstock.testing.meeting import meeting


class Workers:
    """``size`` processes of the Python file ``script``, which calls :func:`serve`, placed as ``torchrun`` places them.

    A context: they end with the block.
    """

    def __init__(self, script: Path, size: int, *arguments: str) -> None:
        self._meeting = contextlib.ExitStack()
        place = self._meeting.enter_context(meeting(size))
        place |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()
        self._meeting.close()

    def ask(self, order: str, patience: float = 300.0) -> list[Any]:
        """What each process answers to ``order``, in order of their ranks.

        Raises:
            PenstockError: one has ended, or has not answered within ``patience`` seconds.
        """
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            try:
                process.stdin.write(order + "\n")
                process.stdin.flush()
            except BrokenPipeError as error:
                raise _ended(rank) from error
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + patience
        with selectors.DefaultSelector() as waiting:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                waiting.register(process.stdout, selectors.EVENT_READ, (rank, process.stdout))
            while waiting.get_map():
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    silent = ", ".join(str(rank) for rank in range(len(self._processes)) if rank not in answers)
                    raise PenstockError(f"rank {silent} of the benchmark has not answered within {patience:g} s")
                for (_, _, _, (rank, stream)), _ in ready:
                    line = stream.readline()
                    if not line:
                        raise _ended(rank)
                    answers[rank] = json.loads(line)
                    waiting.unregister(stream)
        return [answers[rank] for rank in sorted(answers)]


def _ended(rank: int) -> PenstockError:
    return PenstockError(f"rank {rank} of the benchmark has failed", hint="Its own message says why.")


def serve(orders: Callable[[World], Callable[[str], Any]]) -> None:
    """The main function of such a process: joins the others, and answers each order with JSON, until there are no more.

    Args:
        orders: makes, in its place, the function from an order to its answer.
    """
    # Answers have the output to themselves: whatever else is printed, by NCCL too, goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    world = World.join()
    answer = orders(world)
    for line in sys.stdin:
        print(json.dumps(answer(line.rstrip("\n"))), file=answers, flush=True)
    world.end()
