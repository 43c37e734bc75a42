"""The start of an engine on a CUDA device: kernels built ahead, the same graphs each time, memory within its share; and
what log-probabilities cost a step.

With ``-s`` the figures are printed.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from penstock.core.devices import DeviceMemory
from penstock.models.config import DecoderConfig
from penstock.models.decoder import Decoder
from penstock.ops.paged.contract import CacheShape
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.messages import Request, described

pytestmark = pytest.mark.gpu

#: Of Qwen3-0.6B.
SHAPE = DecoderConfig(
    vocabulary=151936, hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, ffn=3072, context=4096,
    qk_norm=True, tied=True,
)  # fmt: skip
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model() -> Decoder:
    with CUDA:
        made = Decoder(SHAPE)
    return made.initialize(0).to(CUDA, torch.bfloat16).eval()


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def play(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()


def graphs_of(engine: Engine) -> list[Any]:
    executor: Any = engine.executor
    return sorted(shape for graphs in executor.passes.captured[False] for shape in graphs.shapes)


def test_all_kernels_that_are_used_were_built_ahead() -> None:
    pytest.importorskip("flashinfer")
    from flashinfer.jit.core import jit_spec_registry

    from penstock.ops.paged import flashinfer_kernels

    @contextlib.contextmanager
    def printed(label: str, total: float | None, unit: str) -> Iterator[Any]:
        begun = time.monotonic()
        yield type("Bar", (), {"advance": lambda self, amount=1, note="": None})()
        print(f"\n{label}: {total} {unit}s in {time.monotonic() - begun:.0f} s")

    prepared: set[str] = set()
    for windows in ({}, {"window": 40, "windowed_layers": (0, 2)}):
        shape = DecoderConfig(
            vocabulary=2000, hidden=512, layers=4, heads=8, kv_heads=2, head_dim=128, ffn=512, context=512, **windows
        )
        with CUDA:
            small = Decoder(shape)
        small = small.initialize(0).to(CUDA, torch.bfloat16).eval()
        engine = build_engine(
            small, EngineConfig(sequences=8, cache_tokens=4096, attention="flashinfer"), report=printed
        )
        play(engine, *(Request(str(n), [1] * (1 + 40 * n), SamplingParams(max_tokens=4)) for n in range(6)))
        cache = CacheShape(
            4, 8, 2, 128, 1, 16, torch.bfloat16, CUDA, frozenset(shape.window_of(layer) for layer in range(4))
        )
        prepared |= {spec.name for spec in flashinfer_kernels._specs(cache)}
        # Whatever FlashInfer loads it makes a spec of first, and remembers it.
        loaded = jit_spec_registry.get_all_specs()
        assert set(loaded) <= prepared
        assert all(loaded[name].is_compiled for name in prepared)


def test_a_second_start_has_the_same_graphs_and_does_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CUDA:
        model = Decoder(SHAPE.model_copy(update={"layers": 6}))  # it is compiled six times
    model = model.initialize(0).to(CUDA, torch.bfloat16).eval()
    config, found = EngineConfig(sequences=128, cache_tokens=1 << 16), []
    for number in range(3):  # three machines, as it were
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
        found.append(graphs_of(build_engine(model, config)))
        with monkeypatch.context() as patched:
            patched.setattr("penstock.serve.run.runner.rows_worth_replaying", None)
            assert graphs_of(build_engine(model, config)) == found[-1]
    print(f"\ngraphs when measured anew, three times: {[len(each) for each in found]}")
    most = [max(shape.rows for shape in each if shape.others) for each in found]
    assert max(most) <= 1.5 * min(most)  # one step of those that are timed


@pytest.mark.parametrize("compile", [False, True])
def test_all_memory_is_within_its_share_whatever_is_asked_for(model: Decoder, compile: bool) -> None:
    share, memory = 0.6, DeviceMemory(CUDA)
    engine = build_engine(model, EngineConfig(memory=share, compile=compile, sequences=256))
    print(f"\n{described(engine.executor.memory)}")
    torch.cuda.reset_peak_memory_stats(CUDA)
    draw = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        return torch.randint(10000, (length,), generator=draw).tolist()

    heavy: dict[str, Any] = {"top_p": 0.95, "logprobs": 20, "presence_penalty": 0.5, "logit_bias": {7: 1.0}}
    play(
        engine,
        *(Request(str(n), prompt(700), SamplingParams(max_tokens=60, seed=n, **heavy)) for n in range(300)),
        Request("long", prompt(4000), SamplingParams(max_tokens=20, prompt_logprobs=20, **heavy)),
    )
    torch.cuda.synchronize()
    # What the driver counts, had the allocator kept all that it ever had.
    used = memory.total - torch.cuda.mem_get_info(CUDA)[0]
    used += torch.cuda.max_memory_reserved(CUDA) - torch.cuda.memory_reserved(CUDA)
    print(f"peak {used / memory.total:.4f} of the device, of a share of {share}")
    assert used <= (share + 0.005) * memory.total
    assert sum(engine.executor.memory.values()) == memory.total
    cache = engine.executor.memory["cache"]
    assert cache > (share - 0.2) * memory.total  # and what is left of the share is the cache's


def step_of(engine: Engine, logprobs: int | None) -> Callable[[], None]:
    """A step of 128 sequences that decode."""
    for number in range(128):
        sampling = SamplingParams(max_tokens=3000, ignore_eos=True, logprobs=logprobs, seed=number)
        engine.add(Request(str(number), [number + 1] * 64, sampling))
    for _ in range(20):
        engine.step()
    return engine.step  # type: ignore[return-value]


def test_log_probabilities_are_one_copy_a_step_and_keep_the_device_busy(model: Decoder) -> None:
    engine = build_engine(model, EngineConfig(sequences=128, cache_tokens=128 * 1024))
    found: dict[int | None, float] = {}
    for logprobs in (None, 5):
        step = step_of(engine, logprobs)
        times = []
        for _ in range(200):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for _ in range(20):
                step()
            torch.cuda.synchronize()
        events = [each for each in profiled.events() if each.device_type == DeviceType.CUDA]
        copies = sum("Memcpy DtoH" in each.name for each in events)
        busy = sum(each.time_range.elapsed_us() for each in events if "Memcpy" not in each.name) / 20
        found[logprobs] = median(times)
        print(
            f"\nlogprobs={logprobs}: a step {1e3 * median(times):.2f} ms, the device busy {busy / 1e3:.2f} ms of it, "
        )
        assert copies <= 20 * (1 if logprobs is None else 2) + 2
        for number in range(128):
            engine.abort(str(number))
        while engine.busy:
            engine.step()
    print(f"a step with log-probabilities takes {found[5] / found[None]:.3f} of one without")
