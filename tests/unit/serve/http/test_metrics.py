"""Figures for Prometheus."""

from __future__ import annotations

import dataclasses

from prometheus_client.parser import text_string_to_metric_families

from penstock.serve.http.metrics import ServerMetrics
from penstock.serve.messages import Snapshot, described

MEMORY = {"weights": 16_400_000_000, "cache": 48_000_000_000, "left": 12_000_000_000}
#: Of another rank.
LESS = {"weights": 16_300_000_000, "cache": 48_000_000_000}
SNAPSHOT = Snapshot(*[0] * 13, 0.0)


def test_memory_is_told_by_what_it_is_for_and_of_which_rank():
    text = ServerMetrics(lambda: SNAPSHOT, [MEMORY, LESS], "int8").text().decode()
    (found,) = [each for each in text_string_to_metric_families(text) if each.name == "penstock_memory_bytes"]
    told = {(sample.labels["rank"], sample.labels["use"]): sample.value for sample in found.samples}
    assert told == {("0", use): size for use, size in MEMORY.items()} | {("1", use): size for use, size in LESS.items()}
    assert described(MEMORY) == "weights 16.4 GB, cache 48 GB, left 12 GB"
    assert 'penstock_cache_codec{codec="int8"} 1.0' in text


def test_there_are_no_figures_of_memory_that_is_not_known():
    assert "penstock_memory_bytes{" not in ServerMetrics(lambda: SNAPSHOT, [], "plain").text().decode()


def test_the_cache_and_its_tiers_are_told():
    now = dataclasses.replace(SNAPSHOT, hits=30, misses=4, evicted=5, tier_bytes=(600, 70), tier_hits=(8, 9))
    text = ServerMetrics(lambda: now, [], "plain").text().decode()
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert [found[f"penstock_cache_{name}_total",] for name in ("hits", "misses", "evicted")] == [30, 4, 5]
    assert [found["penstock_tier_bytes", tier] for tier in ("host", "disk")] == [600, 70]
    assert [found["penstock_tier_hits_total", tier] for tier in ("host", "disk")] == [8, 9]
