"""Requests that wait for their tokens beside others that do not: overlapped steps beside plain ones.

32 requests decode. None, one or all of them follow their own text (the rule ``momentum``), so that their next step
cannot be formed before their last token is known. On CUDA a model with random weights in the shape of Qwen3-0.6B, in
bf16; on the CPU python-6m in fp32.
"""

from __future__ import annotations

import random
import time

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.decode.momentum import Momentum
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.loops.overlapped import Overlapped
from penstock.serve.engine.loops.plain import Plain
from penstock.serve.messages import Request

REQUESTS = 32


def rates(engine: Engine, waiting: int, prompt: int, count: int) -> tuple[float, float]:
    """Tokens a second of those that wait and of the others, each until its kind has ended; 0 for a kind without any."""
    draw, vocabulary = random.Random(0), engine.executor.model.config.vocabulary
    engine.memory.pool.forget()
    begun = time.perf_counter()
    for number in range(REQUESTS):
        tokens = [draw.randrange(3, vocabulary) for _ in range(prompt)]
        rule = Momentum() if number < waiting else None
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, rule=rule)
        engine.add(Request(str(number), tokens, sampling))
    ended = {}
    while engine.busy:
        for delta in engine.step():
            ended[int(delta.id) < waiting] = time.perf_counter() - begun
    kinds = ((True, waiting), (False, REQUESTS - waiting))
    slow, fast = (size * count / ended[kind] if size else 0.0 for kind, size in kinds)
    return slow, fast


def main(bench: Bench) -> None:
    """Measures both loops in turn."""
    shape, model = load("serve").served(bench.device)
    prompt = count = 16 if bench.quick else 256 if bench.device.type == "cuda" else 64
    engines = {
        loop.policy_name: build_engine(
            model, EngineConfig(loop=loop, sequences=REQUESTS, cache_tokens=REQUESTS * 1024), report=show
        )
        for loop in (Overlapped(), Plain())
    }
    with settled():
        for waiting in (0, 1, REQUESTS):
            setting = f"{shape}: {REQUESTS} requests, {waiting} of them wait"
            runs = {name: lambda e=engine, w=waiting: rates(e, w, prompt, count) for name, engine in engines.items()}
            values = bench.turns(runs, setting, 5)
            for place, whose in enumerate(("those that wait", "the others")):
                overlapped, plain = ([each[place] for each in values[name]] for name in ("overlapped", "plain"))
                if all(plain):
                    bench.compared(
                        subject="overlapped",
                        peer="plain",
                        setting=setting,
                        metric=f"throughput of {whose}",
                        unit="tokens/s",
                        values=overlapped,
                        peer_values=plain,
                    )
