"""Where replicas compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.core.errors import UsageError
from penstock.core.processor import Answer
from penstock.serve.config import EngineConfig
from penstock.serve.replicas import placement
from penstock.serve.replicas.placement import places


@pytest.fixture
def four(monkeypatch) -> None:
    """A machine with four GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_processor_is_divided(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(placement, "cores", lambda: Answer(3, "told"))
    config = EngineConfig(kv_disk=Path("blocks"), kv_host=10**9, kv_disk_size=9 * 10**9)
    found = places(config, 3, "cpu")
    assert [place.environment for place in found] == [{"OMP_NUM_THREADS": "2"}] * 3
    assert {place.config.memory for place in found} == {config.memory / 3}
    assert [str(place.config.kv_disk) for place in found] == [f"blocks/replica-{number}" for number in range(3)]
    assert {int(place.config.kv_disk_size) for place in found} == {3 * 10**9}


def test_each_replica_has_devices_of_its_own(four, monkeypatch):
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(EngineConfig(), 3, "auto")] == list("012")
    two = EngineConfig(tensor_parallel=2)
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(two, 2, "cuda")] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-5,3,1")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places(two, 2, "auto")] == ["7,GPU-5", "3,1"]


@pytest.mark.parametrize(
    ("options", "replicas", "device", "words"),
    [
        ({"tensor_parallel": 2}, 3, "auto", "3 replicas of 2 ranks need 6 devices, and there are 4"),
        ({}, 5, "cuda", "5 replicas need 5 devices"),
        ({}, 2, "cuda:1", "replicas take the first devices"),
        ({"record": "steps.bin"}, 2, "cpu", "into one file"),
        ({}, 4, "cpu", "need 4 cores, and there are 3"),
    ],
)
def test_what_there_is_no_place_for_is_refused(four, monkeypatch, options, replicas, device, words):
    monkeypatch.setattr(placement, "cores", lambda: Answer(3, "told"))
    with pytest.raises(UsageError, match=words):
        places(EngineConfig.model_validate(options), replicas, device)
