"""How large the cache is made: with a stand-in for a device that counts what is taken of it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable

import pytest
import torch

from penstock.core.errors import PenstockError
from penstock.ops.paged.reference import ReferenceCache
from penstock.serve.build import build_runner
from penstock.serve.config import EngineConfig
from penstock.serve.rehearsal import rehearse_largest_steps
from penstock.serve.run.runner import Runner
from penstock.serve.sizing import explained_shortage, let_go, settle_memory, weight_bytes
from penstock.testing.rehearsed_graphs import RehearsedGraphs
from penstock.testing.serve_model import small_model

OTHER, STEPS, EACH = 3_000_000, 700_000, 40_000


class Device:
    """Others hold OTHER bytes of it, a step takes STEPS at its peak, and a graph EACH."""

    def __init__(self, total: int, runner: Runner) -> None:
        self.total, self._runner, self.graphs = total, runner, 0

    def free(self) -> int:
        shape = self._runner.cache.shape
        taken = OTHER + weight_bytes(self._runner.model) + shape.blocks * shape.block_bytes + EACH * self.graphs
        return self.total - taken

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return STEPS


def settle(runner: Runner, config: EngineConfig, device: Device, compiled: bool) -> None:
    settle_memory([runner], config, device, compiled, lambda: rehearse_largest_steps(config, runner))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(ReferenceCache, "fix", lambda *_: True)
    monkeypatch.setattr("penstock.serve.run.passes.StepGraphs", RehearsedGraphs)
    monkeypatch.setattr("penstock.serve.run.runner.chosen", lambda *_: 100)
    return build_runner(small_model(), CONFIG.model_copy(update={"cache_tokens": 400}))


CONFIG = EngineConfig(attention="reference", sequences=8, tokens=40, check=True)


@pytest.mark.parametrize(
    ("share", "compiled"),
    [
        (0.5, False),
        (0.85, True),
        (1.0, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.5, True), (0.85, False), (1.0, True))),
    ],
)
def test_all_that_is_taken_is_the_share_to_within_a_block(runner, compiled, share, monkeypatch, caplog):
    device = Device(20_000_000, runner)
    capture = RehearsedGraphs._capture

    def counted(self, shape):
        device.graphs += 1
        return capture(self, shape)

    monkeypatch.setattr(RehearsedGraphs, "_capture", counted)
    tried = runner.try_graphs

    def let_go(free):
        found = tried(free)
        device.graphs = 0
        return found

    monkeypatch.setattr(runner, "try_graphs", let_go)
    if compiled:
        runner.compile(CONFIG.tokens)
    with caplog.at_level(logging.INFO):
        settle(runner, CONFIG.model_copy(update={"memory": share}), device, compiled)
    block = runner.cache.shape.block_bytes
    taken = OTHER + runner.memory["weights"] + runner.cache.shape.blocks * block + STEPS + EACH * device.graphs
    assert share * device.total - block < taken <= share * device.total
    assert runner.blocks == runner.cache.shape.blocks - 1
    assert device.graphs == (sum(map(len, runner.passes.shapes)) if compiled else 0)
    assert runner.memory["graphs"] == EACH * device.graphs and runner.memory["other"] == OTHER
    assert runner.memory["left"] == device.total - taken
    assert sum(runner.memory.values()) == device.total
    assert "weights" in caplog.text and "left" in caplog.text


def test_a_cache_whose_size_is_given_stays_as_it_is(runner):
    blocks = runner.blocks
    settle(runner, CONFIG.model_copy(update={"cache_tokens": 400}), Device(20_000_000, runner), False)
    assert runner.blocks == blocks
    assert sum(runner.memory.values()) == 20_000_000


@pytest.mark.parametrize("tokens", [None, 400])
def test_the_largest_steps_are_the_first_behind_all_that_gives_pieces_of_memory_back(runner, tokens, monkeypatch):
    done, device = list[str](), Device(20_000_000, runner)
    monkeypatch.setattr(device, "free", lambda free=device.free: done.append("given back") or free())
    config = CONFIG.model_copy(update={"cache_tokens": tokens})
    settle_memory([runner], config, device, False, lambda: done.append("largest steps"))
    assert done[-1] == "largest steps" and done.count("largest steps") == 2


def test_no_room_is_an_error_that_says_what_to_do(runner):
    with pytest.raises(PenstockError, match="there is room for 0 blocks") as raised:
        settle(runner, CONFIG, Device(4_000_000, runner), False)
    assert "engine.memory" in raised.value.hint


def test_a_device_without_room_for_a_step_is_explained():
    with pytest.raises(PenstockError, match="too little memory"), explained_shortage():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")


def test_tied_weights_count_once():
    model = small_model()
    wanted = sum(each.numel() * each.element_size() for each in model.parameters())
    assert weight_bytes(model) == wanted + sum(each.numel() * each.element_size() for each in model.buffers())


@pytest.mark.parametrize(("taken", "there"), [(1000, True), (1200, False)])
def test_an_engine_that_was_there_before_lets_go_of_its_memory(monkeypatch, taken: int, there: bool):
    """Though it hangs in a cycle; where nothing else is taken than weights, nobody waits for garbage."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken)

    class Engine:
        def __init__(self) -> None:
            self.itself = self

    engine = Engine()
    known = weakref.ref(engine)
    gc.disable()
    try:
        del engine
        let_go(torch.device("cuda"), 1000)
        assert (known() is not None) == there
    finally:
        gc.enable()
