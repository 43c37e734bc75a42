"""Prefill, compression and decode in stages: beside times that were reckoned by hand, and in the engine."""

from __future__ import annotations

import pytest

from penstock.serve.batching.fastcache import FastCache
from penstock.serve.batching.stages import Arrival, Queues, Served, Stage
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request
from penstock.testing.engine.requests import numbers
from penstock.testing.serve_model import small_model

PREFILL, DECODE = Stage(fixed=1, each=0.01, most=2), Stage(fixed=0.5, each=0.1, most=8)

#: Three at once, of which two fit into a batch of prompts; one that comes while the first is computed.
TRACE = [Arrival(0, 100, 2), Arrival(0, 200, 1), Arrival(0, 100, 2), Arrival(3, 100, 1)]


def test_the_times_of_a_trace_are_those_reckoned_by_hand():
    """Prompts of 300 tokens end at 4, where the first two have their first tokens, and the second all of it; one cache
    is compressed by 6.2, then the two prompts that have come since end at 9.2, the last of them at its end; the cache
    of the third is compressed by 11.4; both decode their second token by 12.1."""
    served = Queues(PREFILL, Stage(2, 0.2, 4), DECODE).play(TRACE)
    wanted = [Served(4, 12.1), Served(4, 4), Served(9.2, 12.1), Served(6.2, 6.2)]
    for one, other in zip(served, wanted, strict=True):
        assert one == pytest.approx(other)


def test_caches_that_are_compressed_together_let_the_next_prompt_go_sooner():
    """Four prompts end at 1 + 4 together. One by one their caches take 4 (2 + 0.2) seconds before the fifth prompt is
    computed, in one stage 2 + 0.8."""
    trace = [*[Arrival(0, 100, 2)] * 4, Arrival(1, 100, 1)]
    apart, together = (Queues(Stage(1, 0.01, 4), Stage(2, 0.2, most), DECODE).play(trace)[-1].first for most in (1, 4))
    assert apart == pytest.approx(5 + 4 * 2.2 + 2 - 1)
    assert together == pytest.approx(5 + 2.8 + 2 - 1)


def test_an_idle_device_waits_for_the_next_request():
    served = Queues(PREFILL, Stage(0, 0, 1), DECODE).play([Arrival(5, 100, 3), Arrival(20, 100, 1)])
    assert served == [Served(2, pytest.approx(3.2)), Served(2, 2)]


def test_prompts_that_are_gathered_are_compressed_in_one_stage():
    """Three that come one after the other while another decodes: the batch of prompts begins once all of them wait, and
    the next step compresses their caches together. By ``sarathi`` each is compressed in a step of its own."""
    found = {}
    for batching in (FastCache(together=3, patience=20), "sarathi"):
        config = EngineConfig(
            batching=batching,
            loop="plain",
            attention="reference",
            kv={"name": "sink_window", "budget": 0.5, "every": 4},
            tokens=96,
            sequences=4,
            block_size=4,
            cache_tokens=400,
            check=True,
        )
        engine = build_engine(small_model(), config)
        sizes = []
        for number in range(4):
            prompt = numbers(f"gathered {number}", 20)
            engine.add(Request(str(number), prompt, SamplingParams(temperature=0, max_tokens=12)))
            for _ in range(2):
                engine.step()
                sizes.append(len(engine.steps.last.compactions))
        while engine.busy:
            engine.step()
            sizes.append(len(engine.steps.last.compactions))
        found[str(config.batching.policy_name)] = max(sizes)
    assert found["fastcache"] == 3 and found["sarathi"] == 1


def test_one_who_waits_for_others_does_not_wait_for_ever():
    config = EngineConfig(
        batching=FastCache(together=4, patience=3),
        loop="plain",
        attention="reference",
        tokens=96,
        sequences=4,
        block_size=4,
        cache_tokens=400,
    )
    engine = build_engine(small_model(), config)
    engine.add(Request("first", numbers("first", 5), SamplingParams(temperature=0, max_tokens=30)))
    engine.step()
    engine.add(Request("second", numbers("second", 5), SamplingParams(temperature=0, max_tokens=2)))
    told = [{delta.id for delta in engine.step()} for _ in range(4)]
    assert told == [{"first"}] * 3 + [{"second"}]
