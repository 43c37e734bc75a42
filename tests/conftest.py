"""Shared settings of the test suite: one thread (the models are tiny), hypothesis profiles, few garbage collections."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from penstock.core.garbage import settle
from penstock.core.processor import cores

gc.disable()  # while all modules are imported and nothing is thrown away: a fifth of the time that this takes
settings.register_profile("suite", deadline=None, max_examples=12)
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: the cores that may be used, up to eight, as each process takes more than a gigabyte."""
    return min(8, cores().choice)


def pytest_collection_finish() -> None:
    """One thread; and collections need not look through all modules and tests again and again, which took a fifteenth
    of the time. Here, as a process that only hands out tests to others has no need of PyTorch."""
    import torch

    torch.set_num_threads(1)
    gc.enable()
    settle()
    gc.set_threshold(10_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Before the first test, for those that start programs."""
    if (programs := sys.modules.get("programs")) is not None:
        programs.begin()


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws without a seed of its own does not depend on those before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """What a command sets up for its log is gone when its test is over, where it runs in this process."""
    root, own = logging.getLogger(), logging.getLogger("penstock")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.fixture(autouse=True)
def _shared_models_stay() -> Iterator[None]:
    """No test makes a model invariant that others serve, too: theirs would run other kernels from then on."""
    yield
    if (shared := sys.modules.get("penstock.testing.serve_model")) is not None:
        for model in (shared.small_model, shared.small_mixture):
            if model.cache_info().currsize and type(model().norm).__name__ != "RMSNorm":
                model.cache_clear()  # for those to come
                pytest.fail("a deterministic engine replaces its model's layers: give it a copy")
