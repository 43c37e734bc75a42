"""What of the benchmarks `serve` and `batching` runs without measuring."""

from __future__ import annotations

import pytest

from penstock.core.bench import load
from penstock.core.results import peers_folder, read_results
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.testing.serve_model import small_model


@pytest.fixture(scope="module")
def serving():
    return load("serve")


@pytest.fixture(scope="module")
def batching():
    return load("batching")


def test_every_workload_has_the_peers_figure(serving):
    found = serving.peer_rows()
    for shape in serving.SHAPES:
        for work in serving.cuda_workloads():
            assert found[f"{shape}: {work.name}"].value > 0


def test_the_peers_files_are_results_that_say_where_they_come_from():
    results = read_results(peers_folder())
    assert [result.name for result in results] == ["speculation-elsewhere", "vllm-0.22.0", "vllm-0.26.0"]
    for result in results:
        assert (peers_folder() / f"{result.name}-{result.device}.json").is_file()
        assert result.source
        if result.name.startswith("vllm-"):  # measured beside the project
            assert result.versions["vllm"] == result.name.removeprefix("vllm-")
        assert not any(row.papers for row in result.rows)
        for row in result.rows:
            assert row.ratio is None or row.ratio == pytest.approx(row.value / row.peer_value)


def test_policies_of_a_round_get_the_same_requests_and_rounds_share_none(batching):
    loads = batching.Loads(batching.QUICK, 64)
    for draw in (loads.long_prompts, loads.shared_prefixes, loads.arriving, loads.bursts):
        assert draw(1) == draw(1) != draw(2)
    assert loads.mixed(1, shuffled=False) != loads.mixed(1, shuffled=True)


def test_what_a_load_took_is_counted(batching):
    """Two prompts share 8 of their 12 tokens and come one after the other: the second finds them in the cache."""
    engine = build_engine(small_model(), EngineConfig(block_size=4, cache_tokens=256, sequences=1, tokens=64))
    shared = [5, 9, 2, 6, 5, 3, 5, 8]
    arrivals = [batching.Arrival([*shared, *rest], 3, chat=True) for rest in ([1, 2, 3, 4], [4, 3, 2, 1])]
    figures = batching.play(engine, arrivals)
    assert figures.prefilled == 12 + 12 - 8
    assert figures.throughput > 0
    assert figures.gap > 0
    assert 0 < figures.first < figures.last
