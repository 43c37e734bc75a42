"""A model larger than memory: a small one that drafts while layers are read, beside plain decoding and drafts in turn.

Some of python-6m's layers stay on disk, and each pass reads them; python-1m drafts for it. It continues files of the
standard library that neither has seen, greedily, one after the other. The file lies in the memory of the operating
system after the first pass, as it would not if it were larger than that: so a reading is held up until a disk of the
rate that is given would have brought it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from penstock.core.bench import Bench, load
from penstock.models import hub
from penstock.models.streamed import LayerStream, stream_of
from penstock.serve.build import build_engine
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.run.cascade import CascadeDraft

TARGET, DRAFT = "python-6m", "python-1m"
#: Bytes of weights that may be in memory, of twice as many: the embedding and the buffers, and none of the layers.
RESIDENT = 11_000_000
#: Bytes a second: of an SD card or a disk that turns, and of flash memory.
RATES = (2e8, 1e9)
OUTPUT = 128
PROMPTS = 4
REPETITIONS = 5
PLAIN = "plain decoding from disk"
#: The paper's claim is about all of it: beside decoding without drafts.
WHOLE = "cascade, fallback, tree 2"


def settings() -> dict[str, dict[str, Any]]:
    """The engine's options by what they are called."""
    model, cascade = {"name": "model", "source": DRAFT, "tokens": 8}, {"name": "cascade", "source": DRAFT}
    return {
        PLAIN: {},
        "model, fixed": {"draft": model, "controller": "fixed"},
        "model, fallback": {"draft": model, "controller": "fallback"},
        "cascade, fixed": {"draft": cascade, "controller": "fixed"},
        "cascade, fallback": {"draft": cascade, "controller": "fallback"},
        WHOLE: {"draft": cascade, "controller": "fallback", "draft_tree": "2"},
    }


def hold_up(stream: LayerStream, rate: Callable[[], float]) -> None:
    """Lets ``stream`` read at ``rate`` bytes a second at most."""
    fill = stream.fill

    def slowly(number: int, buffer: Tensor) -> dict[str, nn.Parameter]:
        begun, before = time.perf_counter(), stream.read
        found = fill(number, buffer)
        left = begun + (stream.read - before) / rate() - time.perf_counter()
        time.sleep(max(0.0, left))
        return found

    stream.fill = slowly  # type: ignore[method-assign]


def main(bench: Bench) -> None:
    """Measures all of them at each rate; the model in memory stands beside."""
    if bench.device.type != "cpu":
        bench.console.print("Layers are read from disk on a CPU: nothing to measure here.")
        return
    script, rate = load("speculate"), [RATES[0]]
    draft = hub.load(DRAFT, dtype=torch.float32).eval()
    sizes = {"sequences": 4, "cache_tokens": 4096}
    engines: dict[str, Engine] = {}
    for name, options in settings().items():
        target = hub.load_streamed(TARGET, RESIDENT, dtype=torch.float32).eval()
        stream = stream_of(target)
        assert stream is not None
        hold_up(stream, lambda: rate[0])
        engines[name] = build_engine(target, EngineConfig.model_validate({**sizes, **options}), draft=draft)
    whole = hub.load(TARGET, dtype=torch.float32).eval()
    engines["in memory"] = build_engine(whole, EngineConfig.model_validate(sizes))
    output, todo = (16, script.prompts(1)) if bench.quick else (OUTPUT, script.prompts(PROMPTS))
    runs = {name: functools.partial(script.run, engine, todo, 1, output) for name, engine in engines.items()}
    for rate[0] in RATES[:1] if bench.quick else RATES:
        measure(bench, runs, engines, f"disk of {rate[0] / 1e9:g} GB/s")


def measure(bench: Bench, runs: dict[str, Callable[[], float]], engines: dict[str, Engine], setting: str) -> None:
    """The rows of a rate: each beside plain decoding, and those that draft meanwhile beside those that wait."""
    before = {name: engine.snapshot() for name, engine in engines.items()}
    guesses = {name: _guesses(engine) for name, engine in engines.items()}
    values = bench.turns(runs, setting, REPETITIONS)
    common = {"metric": "decoding speed", "unit": "tokens/s", "setting": setting}
    for name, engine in engines.items():
        beside = {"subject": name, "values": values[name], **common}
        if name != PLAIN:
            papers = (428,) if name == WHOLE else ()
            bench.compared(peer=PLAIN, peer_values=values[PLAIN], papers=papers, **beside)
        waits = name.replace("cascade", "model")
        if waits != name and waits in values:
            bench.compared(peer=waits, peer_values=values[waits], **beside)
        now, then = engine.snapshot(), before[name]
        tokens = (now.output_tokens - then.output_tokens) / (now.sequence_steps - then.sequence_steps)
        bench.row(subject=name, setting=setting, metric="tokens a step of a sequence", unit="", value=tokens)
        guessed, right = (one - other for one, other in zip(_guesses(engine), guesses[name], strict=True))
        if guessed:
            share = right / guessed
            bench.row(subject=name, setting=setting, metric="right guesses of what comes out", unit="", value=share)


def _guesses(engine: Engine) -> tuple[int, int]:
    """How often what would come out was guessed, and how often that was right."""
    model = None if engine.steps.speculation is None else engine.steps.speculation.model
    return (model.guessed, model.right) if isinstance(model, CascadeDraft) else (0, 0)
