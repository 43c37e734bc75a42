"""The settings of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from penstock.core.config import Config
from penstock.ops.paged.contract import PagedAttention
from penstock.policy import Choice
from penstock.serve.batching.contract import Batching
from penstock.serve.batching.sarathi import Sarathi
from penstock.serve.engine.loops.contract import Loop
from penstock.serve.engine.loops.overlapped import Overlapped
from penstock.speculate.contract import Drafter


class EngineConfig(Config):
    """How an engine works.

    Attributes:
        batching: forms the batch of each step.
        loop: in which order scheduling, computing and publishing follow each other.
        attention: attention over the cache; None picks the best that serves the device.
        dtype: of weights and cache; ``auto`` is bf16 on CUDA devices that have units for it, else fp32.
        tokens: the token budget of a step, at least ``sequences``, so that all of them can go on in one; None is 8,192
            on CUDA, which such a step keeps busy, and 2,048 on the CPU.
        sequences: most sequences that run at a time.
        block_size: tokens of a block of the cache.
        cache_tokens: tokens for which the cache has room; None sizes it by ``memory``.
        memory: share of the device's memory that may be in use, by weights, cache, graphs, the largest steps, and
            whoever else is there; on the CPU, half as large a share of what is free is for the cache.
        context: most tokens of a sequence; None takes the model's own limit.
        drafter: drafts tokens ahead, which one pass then checks together; None computes one token a sequence a step.
        compile: on CUDA, compile the model and capture steps as graphs at the start, those that decode and those whose
            prompts the device computes as fast as the host queues them: tens of seconds that make every step shorter.
        deterministic: compute each request with the same bits whatever else is in the batch, however its prompt is cut
            and shared, and also after a preemption. It costs the choice of the fastest kernel for each batch, and on
            CUDA the compiled pass and its graphs.
        record: a file for all steps, for bug reports and benchmarks; it holds the tokens of all requests. See
            :mod:`penstock.serve.run.record`.
        check: compare the cache's books with the sequences after every step.
    """

    batching: Annotated[Batching, Choice("serve.batching")] = Sarathi()
    loop: Annotated[Loop, Choice("serve.loop")] = Overlapped()
    attention: Annotated[PagedAttention, Choice("attention.paged")] | None = None
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    tokens: PositiveInt | None = None
    sequences: PositiveInt = 256
    block_size: PositiveInt = 16
    cache_tokens: PositiveInt | None = None
    memory: Annotated[float, Field(gt=0, le=1)] = 0.85
    context: PositiveInt | None = None
    drafter: Annotated[Drafter, Choice("speculate.drafter")] | None = None
    compile: bool = True
    deterministic: bool = False
    record: Path | None = None
    check: bool = False

    @model_validator(mode="after")
    def _all_can_go_on(self) -> EngineConfig:
        if self.tokens is not None and self.tokens < self.sequences:
            raise ValueError(f"a budget of {self.tokens} tokens a step cannot serve {self.sequences} sequences")
        return self

    @model_validator(mode="after")
    def _invariant(self) -> EngineConfig:
        if self.deterministic and self.attention is not None and self.attention.policy_name != "invariant":
            raise ValueError(f"deterministic needs the attention 'invariant', not {self.attention.policy_name!r}")
        return self

    @property
    def rows(self) -> int:
        """The most rows of a sequence that goes on that are scored in a step: its newest token, and what is drafted."""
        return 1 + (self.drafter.most if self.drafter else 0)

    def budget(self, device: torch.device) -> int:
        """``tokens``, or what it is on ``device`` where it is not set."""
        return self.tokens or max(8192 if device.type == "cuda" else 2048, self.sequences)
