"""Figures for Prometheus."""

from __future__ import annotations

import dataclasses

from prometheus_client.parser import text_string_to_metric_families

from penstock.serve.http.metrics import ServerMetrics
from penstock.serve.messages import ReplicaState, Snapshot, described

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


def test_the_figures_of_each_replica_have_its_number():
    each = [
        ReplicaState(state, under_way, 2 - under_way, 0, dataclasses.replace(SNAPSHOT, running=running, hits=9))
        for state, under_way, running in (("ready", 2, 5), ("draining", 1, 7))
    ]
    now = dataclasses.replace(SNAPSHOT, replicas=tuple(each), resent=3)
    text = ServerMetrics(lambda: now, [MEMORY, LESS], "plain").text().decode()
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    first, second = ("replica", "0"), ("replica", "1")
    assert (found["penstock_running", first], found["penstock_running", second]) == (5, 7)
    assert found["penstock_memory_bytes", ("rank", "0"), second, ("use", "weights")] == LESS["weights"]
    assert found["penstock_replica_state", second, ("state", "draining")] == 1
    assert found["penstock_replica_under_way", first] == 2
    assert found["penstock_replica_restarts_total", second] == 1
    assert found["penstock_resent_total",] == 3
    assert text.count("# TYPE penstock_cache_hits_total counter") == 1


def test_there_are_no_figures_of_memory_that_is_not_known():
    assert "penstock_memory_bytes{" not in ServerMetrics(lambda: SNAPSHOT, [], "plain").text().decode()


def test_compression_is_told():
    now = dataclasses.replace(SNAPSHOT, policy="h2o", dropped_tokens=40, compress_seconds=1.5)
    text = ServerMetrics(lambda: now, [], "plain").text().decode()
    assert "penstock_dropped_tokens_total 40.0" in text
    assert "penstock_compress_seconds_total 1.5" in text


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
