"""``best_of``: the continuations that an answer is made of."""

from __future__ import annotations

import pytest
import torch

from penstock.models import hub
from penstock.ops.paged.reference import Reference
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.serve.offline.gather import Gatherer


@pytest.mark.parametrize("logprobs", [None, 1])
def test_the_best_continuations_are_those_of_the_highest_mean(logprobs):
    tokenizer = hub.load_tokenizer("python-1m")
    engine = build_engine(
        hub.load("python-1m", dtype=torch.float32).eval(), EngineConfig(attention=Reference(), cache_tokens=2048)
    )
    gatherer, results = Gatherer(engine, tokenizer), {}
    for id, wanted in (("all", {"n": 5, "logprobs": 0}), ("best", {"n": 2, "best_of": 5, "logprobs": logprobs})):
        sampling = SamplingParams(seed=3, max_tokens=8, temperature=1.5, **wanted)
        gatherer.submit(Request(id, tokenizer("def f(")["input_ids"], sampling))
    while gatherer.pending:
        results.update({result.request_id: result for result in gatherer.step()})
    means = {
        tuple(output.token_ids): sum(told[t].logprob for t, told in zip(output.token_ids, output.logprobs, strict=True))
        / len(output.token_ids)
        for output in results["all"].outputs
    }
    wanted = sorted(means, key=lambda tokens: -means[tokens])[:2]
    chosen = results["best"].outputs
    assert [tuple(output.token_ids) for output in chosen] == wanted
    assert [output.index for output in chosen] == [0, 1]
    assert all((output.logprobs is None) == (logprobs is None) for output in chosen)
