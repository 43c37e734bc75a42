"""A step of sampling: 64 rows of scores to 64 tokens, beside transformers' logits processors.

The rows have 512 tokens behind them. transformers takes the options of all rows alike, and its draws are not seeded by
row; penalties are those that both have (repetition).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.core.bench import Bench
from penstock.core.randomness import torch_generator
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.testing.serve_rows import Rows

ROWS, LENGTH, PROMPT = 64, 512, 256

KINDS: dict[str, tuple[SamplingParams, LogitsProcessorList]] = {
    "greedy": (SamplingParams(temperature=0), LogitsProcessorList()),
    "temperature 0.8": (SamplingParams(temperature=0.8), LogitsProcessorList([TemperatureLogitsWarper(0.8)])),
    "temperature 0.8, top-p 0.9": (
        SamplingParams(temperature=0.8, top_p=0.9),
        LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)]),
    ),
    "temperature 0.8, top-k 40, top-p 0.95": (
        SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
        LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(40), TopPLogitsWarper(0.95)]),
    ),
    "temperature 0.8, repetition 1.1": (
        SamplingParams(temperature=0.8, repetition_penalty=1.1),
        LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1), TemperatureLogitsWarper(0.8)]),
    ),
}


def ours(params: SamplingParams, logits: Tensor, texts: Tensor) -> Callable[[], object]:
    """A step of our sampler."""
    sampler = Rows(ROWS, logits.shape[-1], logits.device)
    for slot, tokens in enumerate(texts.tolist()):
        own = params.model_copy(update={"seed": slot})
        sampler.add(slot, Sequence(Request("", tokens[:PROMPT], own), 0, own, tokens, 2 * LENGTH, 0, prompt=PROMPT))
    entries = sampler.entries(list(range(ROWS)), [LENGTH - PROMPT] * ROWS)
    return torch.inference_mode()(lambda: sampler.sample(logits, sampler.asked(entries)).to_host().wait())


def theirs(greedy: bool, processors: LogitsProcessorList, logits: Tensor, texts: Tensor) -> Callable[[], object]:
    """The same step as ``generate`` of transformers does it."""

    def step() -> Tensor:
        scores = processors(texts, logits.clone())
        return (scores.argmax(-1) if greedy else scores.softmax(-1).multinomial(1)).cpu()

    return torch.inference_mode()(step)


def main(bench: Bench) -> None:
    """Measures each kind of request at a small and at a large vocabulary."""
    calls = 2 if bench.quick else 10
    for vocabulary in (4096,) if bench.quick else (4096, 151_936):
        draw = torch_generator(0, "bench/sampler")
        # As of a model: a token's probability falls with a power of its rank.
        rank = 1 + torch.stack([torch.randperm(vocabulary, generator=draw) for _ in range(ROWS)])
        logits = (-1.2 * rank.float().log()).to(bench.device)
        texts = torch.randint(vocabulary, (ROWS, LENGTH), generator=draw).to(bench.device)
        for kind, (params, processors) in KINDS.items():
            run, peer_run = ours(params, logits, texts), theirs(params.temperature == 0, processors, logits, texts)

            def microseconds(step: Callable[[], object]) -> float:
                return 1e6 * bench.seconds(lambda: [step() for _ in range(calls)]) / calls

            bench.compare(
                subject="penstock",
                peer="transformers",
                setting=f"{ROWS} rows, vocabulary {vocabulary:,}, {kind}",
                metric="a step of sampling",
                unit="us",
                better="lower",
                run=lambda r=run, m=microseconds: m(r),
                peer_run=lambda r=peer_run, m=microseconds: m(r),
            )
