"""Processes of one world, forked from this one, that do the same work."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from penstock.parallel.world import World
from penstock.testing.meeting import meeting


def ranks(size: int, work: Callable[[World], Any]) -> list[dict[str, Any]]:
    """What ``work`` returned or raised in each of ``size`` processes, in order of their ranks, and when, in seconds.

    Nothing of one that was killed. What is returned goes through JSON.
    """
    pipes, children, began = [], [], time.monotonic()
    with meeting(size) as place:
        for rank in range(size):
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                result: dict[str, Any] = {}
                try:
                    world = World.join()
                    result["returned"] = work(world)
                    world.leave()
                except BaseException as error:
                    result["raised"] = [type(error).__name__, str(error)]
                os.write(writer, json.dumps(result | {"after": time.monotonic() - began}).encode())
                os._exit(0)
            os.close(writer)
            pipes.append(reader)
            children.append(child)
        answers = []
        for pipe in pipes:
            with os.fdopen(pipe, "rb") as answer:
                answers.append(answer.read())  # to its end, which is the process's
        for child in children:
            os.waitpid(child, 0)
    return [json.loads(answer or "{}") for answer in answers]


def agreed(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What ``work`` returned in each of ``size`` processes.

    Raises:
        AssertionError: it raised something in one of them, or that process was killed.
    """
    results = ranks(size, work)
    faults = [
        f"rank {rank}: {result.get('raised', 'killed')}"
        for rank, result in enumerate(results)
        if "returned" not in result
    ]
    assert not faults, "; ".join(faults)
    return [result["returned"] for result in results]
