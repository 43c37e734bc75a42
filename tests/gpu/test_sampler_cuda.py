"""The sampler on CUDA: the tokens of the CPU, and no waiting for the device."""

from __future__ import annotations

import pytest
import torch

from penstock.core.randomness import torch_generator
from penstock.serve.choose.restriction import restriction_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.decode.fire import Fire
from penstock.serve.decode.momentum import Momentum
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import Request
from penstock.testing.serve_rows import Rows

pytestmark = pytest.mark.gpu

VOCABULARY, ROUNDS = 5000, 6
KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, top_k=20),
    SamplingParams(temperature=1.2, top_p=0.8, min_p=0.01, logprobs=3),
    SamplingParams(temperature=0.7, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(temperature=0.9, logit_bias={7: 3.0, 9: -100.0}, min_tokens=3),
    SamplingParams(temperature=0.8, allowed_tokens=tuple(range(0, 3000, 7)), bad_words=((7,), (14,), (3, 21))),
    SamplingParams(temperature=0, rule=Momentum()),
    SamplingParams(temperature=0.5, rule=Fire()),
]


def sampler(device: str) -> Rows:
    made = Rows(len(KINDS), VOCABULARY, torch.device(device))
    for slot, kind in enumerate(KINDS):
        own = kind.model_copy(update={"seed": slot})
        limits = restriction_of(own, (5,), VOCABULARY)
        made.add(slot, Sequence(Request("", [1, 2, 3], own), 0, own, [1, 2, 3], 99, 0, stop=(5,), restriction=limits))
    return made


@torch.inference_mode()
def tokens(device: str, strict: bool) -> list[list[int]]:
    """What is drawn in some rounds; ``strict`` makes waiting for the device an error while they are queued."""
    made, draw, found = sampler(device), torch_generator(0, "logits"), []
    rounds = [(3 * torch.randn(len(KINDS), VOCABULARY, generator=draw)).to(device) for _ in range(ROUNDS)]
    slots = list(range(len(KINDS)))
    torch.cuda.set_sync_debug_mode("error" if strict else "default")
    try:
        for count, logits in enumerate(rounds):
            found.append(made.sample(logits, made.ask(slots, [count] * len(slots))).to_host())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in found:
        each.wait()
    return [each.tokens.tolist() for each in found]


def test_tokens_are_those_of_the_cpu_and_nothing_waits():
    wanted = tokens("cpu", strict=False)
    assert tokens("cuda", strict=False) == wanted
    # What is compiled or allocated once is there now.
    assert tokens("cuda", strict=True) == wanted
