"""This tree beside an earlier one, in turn: serving, and the host's share of a step.

``PENSTOCK_BEFORE`` names the folder of the earlier tree, by default ``.before``. A file ``COMMIT`` in it says which one
that is, and so do the rows then::

    mkdir -p .before && git archive COMMIT pyproject.toml src bench | tar x -C .before
    git rev-parse --short COMMIT > .before/COMMIT
    penstock bench commits
    penstock bench commits_sampling
    penstock bench commits_device --device cuda

Each tree is a process of its own that runs its own ``bench/serve.py``, ``scheduler.py`` and ``sampler.py``. The two
take turns, so that only one works at a time. On CUDA both lie in the memory together, with fewer cached tokens than
``bench serve`` has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from penstock.core.bench import load
from penstock.core.errors import PenstockError, UsageError

if TYPE_CHECKING:
    from penstock.core.bench import Bench
    from penstock.serve.engine.engine import Engine

ANSWER = "figure: "
#: Steps of sampling, or of a device, that are timed together, steps before those of a device, and steps of the host of
#: which the median is taken.
STEPS, WARM, DECODING = 20, 60, 200
#: The larger of the models on the CPU; the other one lies in the package.
LARGE = "120 M, random"
#: Of the requests of mixed lengths so many are taken on CUDA.
FEW = 64
#: Cached tokens of each tree on CUDA.
CACHE = {"Qwen3-0.6B shape": 294_912, "Qwen3-8B shape": 98_304}


class Tree:
    """The process of a tree: measures what it is asked for with the scripts of that tree.

    Attributes:
        name: what rows call it where it is the earlier one.

    Raises:
        UsageError: the folder has no sources.
        PenstockError: the process ended; what it wrote is above.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not (folder / "src" / "penstock").is_dir():
            raise UsageError(
                f"there is no earlier tree in {folder}",
                hint=f"mkdir -p {folder} && git archive COMMIT pyproject.toml src bench | tar x -C {folder}",
            )
        noted = folder / "COMMIT"
        self.name = f"the tree of {noted.read_text().strip()}" if noted.is_file() else "the tree before"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(device)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.absolute() / "src"), *sys.path[1:]])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def figure(self, name: str, *given: object) -> float:
        """What ``name`` of :class:`Figures` gives in this tree."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, *given]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return float(line.removeprefix(ANSWER))
        raise PenstockError(f"the process of the tree ended while it measured {name} {given}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


class Figures:
    """In the process of a tree: its figures by name, each made with that tree's own scripts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._engines: dict[str, Engine] = {}

    def serving(self, shape: str, workload: str) -> float:
        """Tokens a second."""
        engine = self._engine(shape)
        return float(load("serve").run(engine, self._workload(shape, workload)))

    def stepping(self, policy: str, waiting: int) -> float:
        """Milliseconds of the host for a step with 64 sequences that decode."""
        from penstock.testing.enrolled import enrolled

        engine, times = load("scheduler").loaded(enrolled("serve.batching")[policy], waiting), []
        for _ in range(DECODING):
            begun = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - begun)
        return 1e3 * statistics.median(times)

    def running(self, shape: str, sequences: int) -> float:
        """Microseconds that the device works in a step with so many sequences that decode."""
        from torch.profiler import ProfilerActivity, profile

        serve, engine, draw = load("serve"), self._engine(shape), random.Random(0)
        for number in range(sequences):
            sampling = serve.SamplingParams(seed=number, max_tokens=WARM + STEPS + 2, ignore_eos=True)
            engine.add(serve.Request(str(number), [draw.randrange(3, 100_000) for _ in range(128)], sampling))
        for _ in range(WARM):
            engine.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(STEPS):
                engine.step()
            torch.cuda.synchronize()
        while engine.busy:
            engine.step()
        return sum(event.self_device_time_total for event in seen.key_averages()) / STEPS

    def sampling(self, kind: str, vocabulary: int) -> float:
        """Microseconds of a step of sampling."""
        sampler, draw = load("sampler"), torch.Generator().manual_seed(0)
        rank = 1 + torch.stack([torch.randperm(vocabulary, generator=draw) for _ in range(sampler.ROWS)])
        texts = torch.randint(vocabulary, (sampler.ROWS, sampler.LENGTH), generator=draw)
        logits = (-1.2 * rank.float().log()).to(self._device)
        step = sampler.ours(sampler.KINDS[kind][0], logits, texts.to(self._device))
        step()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        return 1e6 * (time.perf_counter() - begun) / STEPS

    def _engine(self, shape: str) -> Engine:
        """The engine of ``shape``, which stays until another is asked for."""
        from penstock.core.garbage import settle
        from penstock.models import hub
        from penstock.models.decoder import Decoder
        from penstock.serve.build import build_engine
        from penstock.serve.config import EngineConfig

        serve = load("serve")
        if shape not in self._engines:
            self._engines.clear()
            gc.unfreeze()
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
                model = serve.random_model(serve.SHAPES[shape], self._device)
                engine = build_engine(model, serve.OFFLINE.model_copy(update={"cache_tokens": CACHE[shape]}))
            else:
                made = Decoder(serve.SMALL).initialize(0) if shape == LARGE else hub.load(shape, dtype=torch.float32)
                engine = build_engine(made.eval(), EngineConfig(sequences=64))
            self._engines[shape] = engine
            settle()  # or the collector goes through all modules now and then, of which this tree has more
        return self._engines[shape]

    def _workload(self, shape: str, name: str) -> Any:
        works = load("serve").cuda_workloads()
        if self._device.type == "cuda":
            work = next(work for work in works if work.name == name)
            if work is not works[1]:
                return work
            prompts, outputs = work.prompts[:FEW], work.outputs[:FEW]
            return dataclasses.replace(work, prompts=prompts, outputs=outputs, counted=sum(outputs))
        draw, count = random.Random(0), 16 if shape == LARGE else FEW
        prompts = [[draw.randrange(3, 4096) for _ in range(draw.randint(32, 256))] for _ in range(count)]
        outputs = [draw.randint(32, 256) for _ in range(count)]
        return dataclasses.replace(works[0], prompts=prompts, outputs=outputs, counted=sum(outputs), temperature=0)


@contextlib.contextmanager
def trees(device: torch.device) -> Iterator[tuple[Tree, Tree]]:
    """The processes of the earlier tree and of this one."""
    before = Tree(Path(os.environ.get("PENSTOCK_BEFORE", ".before")), device)
    now = Tree(Path(__file__).parents[1], device)
    try:
        yield before, now
    finally:
        before.close()
        now.close()


def beside(bench: Bench, both: tuple[Tree, Tree], figure: str, given: tuple[Any, ...], **fields: Any) -> None:
    """A row of what ``figure`` gives in this tree, beside the tree before."""
    before, now = both
    runs: dict[str, Callable[[], float]] = {
        "peer_run": lambda: before.figure(figure, *given),
        "run": lambda: now.figure(figure, *given),
    }
    bench.compare(subject="this tree", peer=before.name, **runs, **fields)


def main(bench: Bench) -> None:
    """Measures every figure of both trees in turn."""
    on_cuda, serve = bench.device.type == "cuda", load("serve")
    if on_cuda:
        works = [(shape, work.name) for shape in serve.SHAPES for work in serve.cuda_workloads()]
    else:
        works = [(shape, f"{n} requests, 32 to 256 in and out, fp32") for shape, n in (("python-6m", FEW), (LARGE, 16))]
    waits = [] if on_cuda else [(name, count) for name in ("sarathi", "orca", "batchllm") for count in (10, 1000)]
    with trees(bench.device) as both:
        for shape, name in works[:1] if bench.quick else works:
            setting = f"{shape}: {name}".replace("256 requests", f"{FEW} requests")
            beside(
                bench, both, "serving", (shape, name), setting=setting, metric="throughput", unit="tokens/s",
                repetitions=5 if name.startswith("one") else 3,
            )  # fmt: skip
        for policy, count in waits[:1] if bench.quick else waits:
            setting = f"{policy}: 64 decoding, {count:,} waiting"
            beside(
                bench, both, "stepping", (policy, count), setting=setting, metric="host time of a step", unit="ms",
                better="lower",
            )  # fmt: skip


def answer(device: str) -> None:
    """The loop of a tree's process: each line of the input names a figure, each answer is a line."""
    figures = Figures(torch.device(device))
    for line in sys.stdin:
        name, *given = json.loads(line)
        print(f"{ANSWER}{getattr(figures, name)(*given)}", flush=True)


if __name__ == "__main__":
    answer(sys.argv[1])
