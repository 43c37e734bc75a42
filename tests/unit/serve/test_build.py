"""What an engine does before it serves."""

from __future__ import annotations

import pytest

from penstock.ops.linear import FEW
from penstock.serve.build import _rehearse, build_engine
from penstock.serve.config import EngineConfig
from penstock.testing.serve_model import small_model


@pytest.mark.parametrize("batching", ["sarathi", "batchllm", "orca"])
def test_a_rehearsal_meets_a_full_step_and_each_small_number_of_rows(batching):
    config = EngineConfig(batching=batching, tokens=64, sequences=8, cache_tokens=400, check=True)
    engine = build_engine(small_model(), config)
    launch, met = engine.executor.launch, []
    engine.executor.launch = lambda batch: (
        met.append((batch.tokens, sum(e.scored for e in batch.entries))),
        launch(batch),
    )[-1]
    _rehearse(engine)
    assert (64, 1) in met
    assert {(rows + 1, rows) for rows in range(1, FEW + 1)} <= set(met)
    assert engine.memory.pool.held == 0 and not engine.busy


def test_an_engine_for_one_short_sequence_at_a_time_can_rehearse():
    engine = build_engine(small_model(), EngineConfig(tokens=2, sequences=1, context=16, cache_tokens=64))
    _rehearse(engine)
    assert engine.memory.pool.held == 0 and not engine.busy
