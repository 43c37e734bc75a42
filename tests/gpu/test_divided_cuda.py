"""A model that is divided between two GPUs, over NCCL, with compiled passes and graphs."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from penstock.models import hub
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.offline.llm import LLM
from penstock.serve.ranks.group import RankLostError
from tiny_adapters import written

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

MODEL = "python-6m"
PROMPTS = ["def add(", "class Stack:", "import os", "for i in range("]
PARAMS = [SamplingParams(temperature=temperature, seed=3, max_tokens=48) for temperature in (0, 0, 0.8, 1)]


def said(**options) -> list[list[int]]:
    with LLM(MODEL, device="cuda", cache_tokens=8192, sequences=16, dtype="fp32", **options) as llm:
        return [result.outputs[0].token_ids for result in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("compiled", [False, True])
def test_two_devices_say_what_one_says(compiled):
    assert said(tensor_parallel=2, compile=compiled) == said(compile=compiled)


@pytest.mark.parametrize("way", ["tensor_parallel", "pipeline_parallel"])
def test_what_is_drafted_is_checked_by_both(way):
    assert said(**{way: 2}, draft="ngram") == said()


@pytest.mark.parametrize("loop", ["overlapped", "plain"])
def test_two_stages_say_what_one_device_says(loop):
    assert said(pipeline_parallel=2, loop=loop) == said(compile=False)


def test_the_cache_of_both_stages_is_sized_by_what_the_last_one_has_left():
    with LLM(MODEL, device="cuda", pipeline_parallel=2, sequences=16, memory=0.3) as llm:
        executor = llm.engine.executor
        (other,) = executor.ranks.memory
        assert executor.memory["cache"] >= other["cache"] > 2**30
        assert len([*llm.generate(PROMPTS, PARAMS)]) == len(PROMPTS)


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_are_divided_as_the_matrices_are(tmp_path, compiled):
    folder = written(tmp_path, hub.load(MODEL, dtype=torch.float32), 0, rank=4, size=0.1)
    options = {"device": "cuda", "cache_tokens": 8192, "sequences": 16, "dtype": "fp32", "compile": compiled}
    found = []
    for ranks in (1, 2):
        with LLM(MODEL, tensor_parallel=ranks, adapters={"a": folder}, **options) as llm:
            results = llm.generate(PROMPTS, PARAMS, adapter="a")
            found.append([result.outputs[0].token_ids for result in results])
    assert found[0] == found[1] != said(compile=compiled)


def test_the_cache_of_both_is_sized_by_what_is_left():
    with LLM(MODEL, device="cuda", tensor_parallel=2, sequences=16, memory=0.3) as llm:
        executor = llm.engine.executor
        (other,) = executor.ranks.memory
        assert executor.memory["cache"] == other["cache"] > 2**30
        assert executor.memory["weights"] == other["weights"] < 0.6 * _bytes()
        assert executor.memory["graphs"] > 0


def _bytes() -> int:
    return sum(each.numel() * 2 for each in hub.load(MODEL).parameters())


@pytest.mark.parametrize("way", ["tensor_parallel", "pipeline_parallel"])
def test_a_rank_that_is_killed_is_named_though_nobody_waits_for_nccl(way):
    with LLM(MODEL, device="cuda", **{way: 2}, cache_tokens=8192, sequences=16) as llm:
        llm.generate(PROMPTS, PARAMS)
        os.kill(llm.engine.executor.ranks._processes[0].pid, signal.SIGKILL)
        time.sleep(2)
        with pytest.raises(RankLostError, match="rank 1 has ended without a word"):
            llm.generate(PROMPTS, PARAMS)
