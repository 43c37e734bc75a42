"""An engine that computes nothing: the scheduler, the pool and the loop are real, time is reckoned.

For what a batching policy does over thousands of steps, which no model is needed for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as List

import torch

from penstock.models.config import DecoderConfig
from penstock.serve.choose.logprobs import Logprobs
from penstock.serve.choose.sampler import Sampled
from penstock.serve.config import EngineConfig
from penstock.serve.engine.batch import Batch
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request

#: Tokens that a simulated model knows; it always says the first.
VOCABULARY = 1 << 20


class SimulatedRunner:
    """An executor without a model: every token that comes out is 0.

    Args:
        blocks: of the cache, of ``block_size`` tokens.

    Attributes:
        launched: how many batches there were; ``batch`` is the last.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        one = {"hidden": 2, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "ffn": 1}
        self.shape = DecoderConfig.model_validate({"vocabulary": VOCABULARY, "context": blocks * block_size, **one})
        self.device = torch.device("cpu")
        self.memory: dict[str, int] = {}
        self.launched = 0
        self.batch: Batch | None = None

    def launch(self, batch: Batch) -> Sampled:
        """Knows the tokens at once."""
        self.launched, self.batch = self.launched + 1, batch
        rows = sum(entry.scored for entry in batch.entries)
        wanted = [each.sequence.sampling.alternatives for each in batch.entries for _ in range(each.scored)]
        most = [each for each in wanted if each is not None]
        logprobs = None if not most else _logprobs(len(most), max(most))
        return Sampled(torch.zeros(rows, dtype=torch.int64), logprobs)

    def close(self) -> None:
        """Nothing is under way."""


@functools.cache
def _logprobs(rows: int, most: int) -> Logprobs:
    """Of ``rows`` tokens 0, which are as probable as some others."""
    return Logprobs.of(torch.zeros(rows, most + 1), torch.zeros(rows, dtype=torch.int64), most)


def simulated_engine(config: EngineConfig) -> Engine:
    """An engine whose model takes no time. ``cache_tokens`` must be set."""
    return Engine(config, _runner(config))


def _runner(config: EngineConfig) -> SimulatedRunner:
    assert config.cache_tokens is not None
    return SimulatedRunner(config.cache_tokens // config.block_size, config.block_size)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step computed: sequences that decoded, other tokens, and the tokens that all of these looked back at."""

    decoded: int
    prefilled: int
    read: int


#: Seconds that a step takes.
Cost = Callable[[Step], float]


@dataclasses.dataclass
class Course:
    """What happened.

    Attributes:
        steps: the steps, in order; ``seconds`` when the last ended.
        tokens: for each request, when each of its tokens was known.
        held: after each step, the blocks that sequences held.
        cached: prompt tokens that were found in the cache.
    """

    steps: list[Step] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    tokens: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    held: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0

    @property
    def prefilled(self) -> int:
        """Prompt tokens that were computed, with those computed again."""
        return sum(step.prefilled for step in self.steps)


def roofline(compute: float, memory: float) -> Cost:
    """A step takes the longer of ``compute`` seconds for each token and ``memory`` seconds for each token read."""
    return lambda step: max(compute * (step.decoded + step.prefilled), memory * step.read)


def simulate(config: EngineConfig, requests: List[Request], arrivals: List[float] | None, cost: Cost) -> Course:
    """Plays ``requests``, which arrive at the times ``arrivals`` (all at 0 for None), to their end."""
    runner, course = _runner(config), Course(tokens={request.id: [] for request in requests})
    engine = Engine(config, runner)
    coming = deque(sorted(zip(arrivals or [0.0] * len(requests), requests, strict=True), key=lambda pair: pair[0]))
    while coming or engine.busy:
        if not engine.busy:
            course.seconds = max(course.seconds, coming[0][0])
        while coming and coming[0][0] <= course.seconds:
            engine.add(coming.popleft()[1])
        begun = runner.launched
        deltas = engine.step()
        if runner.launched > begun and runner.batch is not None:
            step = _step_of(runner.batch)
            course.steps.append(step)
            course.seconds += cost(step)
        course.held.append(engine.memory.pool.held)
        for delta in deltas:
            course.tokens[delta.id] += [course.seconds] * len(delta.tokens)
        assert math.isfinite(course.seconds)
    course.cached = engine.snapshot().cached_tokens
    return course


def _step_of(batch: Batch) -> Step:
    entries = batch.entries
    decoding = [entry for entry in entries if entry.count == 1 and entry.start >= entry.sequence.prompt]
    return Step(
        decoded=len(decoding),
        prefilled=sum(entry.count for entry in entries) - len(decoding),
        read=sum(entry.start + entry.count for entry in entries),
    )
