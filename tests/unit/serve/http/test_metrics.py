"""Figures for Prometheus."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from penstock.serve.http.metrics import ServerMetrics
from penstock.serve.messages import Snapshot, described

MEMORY = {"weights": 16_400_000_000, "cache": 48_000_000_000, "left": 12_000_000_000}
SNAPSHOT = Snapshot(*[0] * 13, 0.0)


def test_memory_is_told_by_what_it_is_for():
    text = ServerMetrics(lambda: SNAPSHOT, MEMORY).text().decode()
    (found,) = [each for each in text_string_to_metric_families(text) if each.name == "penstock_memory_bytes"]
    assert {sample.labels["use"]: sample.value for sample in found.samples} == MEMORY
    assert described(MEMORY) == "weights 16.4 GB, cache 48 GB, left 12 GB"


def test_there_are_no_figures_of_memory_that_is_not_known():
    assert "penstock_memory_bytes{" not in ServerMetrics(lambda: SNAPSHOT, {}).text().decode()
