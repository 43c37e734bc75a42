"""What a step takes of the device in this tree and in an earlier one, without the host; ``bench/commits.py`` says where
that is.

A small model's step is over before a slow or a busy host has planned the next one, and tokens a second tell of the host
then, while what the kernels take does not. What the host takes is timed without any model by ``commits``, on a CPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError

CROWDS = (1, 64)


def main(bench: Bench) -> None:
    """Measures steps that decode, for one sequence and for many."""
    if bench.device.type != "cuda":
        raise UsageError("the benchmark commits_device measures a GPU", hint="Say --device cuda.")
    commits, shape = load("commits"), next(iter(load("serve").SHAPES))
    with commits.trees(bench.device) as both:
        with ThreadPoolExecutor() as pool:  # to compile and to capture takes each of them a minute or two
            list(pool.map(lambda tree: tree.figure("running", shape, CROWDS[0]), both))
        for count in CROWDS[:1] if bench.quick else CROWDS:
            setting = f"{shape}: {count} decoding" if count > 1 else f"{shape}: one request"
            metric, given = "device's time of a step", (shape, count)
            commits.beside(
                bench, both, "running", given, setting=setting, metric=metric, unit="us", better="lower", repetitions=5
            )
