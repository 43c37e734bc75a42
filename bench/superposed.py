"""Three suggestions of a line of code: superposed in one row, beside as many that are drawn, on one engine.

python-6m continues files of the standard library that it has not seen, one request at a time, as an editor asks. What
is drawn is drawn as usual (top-p), its three texts in one batch over one prompt. Beside the seconds, what the texts are
worth: how much of the best of the three is what the file says, and how the model itself rates each text alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from penstock.core.bench import Bench, load
from penstock.core.garbage import settled
from penstock.core.progress import show
from penstock.models import hub
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.sequence import common
from penstock.serve.messages import Delta, Request

MODEL = "python-6m"
TEXTS, OUTPUT, ASKED = 3, 16, 64
KINDS: dict[str, dict[str, Any]] = {
    "superposed": {"temperature": 0, "rule": "superposed"},
    "drawn": {"temperature": 0.8, "top_p": 0.95},
}
#: A prompt, and what the file says behind it.
Asked = list[tuple[list[int], list[int]]]


def answered(engine: Engine, prompt: list[int], sampling: SamplingParams) -> list[Delta]:
    """All that ``engine`` tells of a request."""
    engine.add(Request("0", prompt, sampling))
    found: list[Delta] = []
    while engine.busy:
        found += engine.step()
    return found


def suggested(bench: Bench, engine: Engine, asked: Asked, kind: str) -> tuple[float, float, float]:
    """Seconds of a request, tokens of the best text that are the file's, and the texts' perplexity, each in the mean
    over what is ``asked``."""
    engine.memory.pool.forget()
    params = {"n": TEXTS, "max_tokens": OUTPUT, "ignore_eos": True, **KINDS[kind]}
    sampling, texts = SamplingParams.model_validate(params), list[list[list[int]]]()

    def generated() -> None:
        for prompt, _ in asked:
            own: list[list[int]] = [[] for _ in range(TEXTS)]
            for delta in answered(engine, prompt, sampling):
                own[delta.index] += delta.tokens
            texts.append(own)

    seconds = bench.seconds(generated)
    right = [max(common(text, wanted) for text in own) for own, (_, wanted) in zip(texts, asked, strict=True)]
    rated = [
        row.logprob
        for own, (prompt, _) in zip(texts, asked, strict=True)
        for text in own
        for row in alone(engine, prompt, text)
    ]
    return seconds / len(asked), sum(right) / len(asked), math.exp(-math.fsum(rated) / len(rated))


def alone(engine: Engine, prompt: list[int], text: list[int]) -> list[Any]:
    """What the model says of each token of ``text`` behind ``prompt``, read by itself."""
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=len(prompt))
    (delta,) = answered(engine, prompt + text, scored)
    return list(delta.prompt_logprobs or ())


def main(bench: Bench) -> None:
    """Measures both kinds in turn."""
    count = 8 if bench.quick else ASKED
    pieces = load("speculate").prompts(count, MODEL)
    asked = [(piece[:-OUTPUT], piece[-OUTPUT:]) for piece in pieces]
    model = hub.load_for_inference(hub.resolve(MODEL)).eval().to(bench.device)
    engine = build_engine(model, EngineConfig(sequences=8, cache_tokens=8192), report=show)
    setting = f"{MODEL}: {count} requests one after the other, {TEXTS} texts of {OUTPUT} tokens each"
    with settled():
        runs = {kind: functools.partial(suggested, bench, engine, asked, kind) for kind in KINDS}
        values = bench.turns(runs, setting, 5)
    rows: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("time of a request", "s", {"better": "lower"}),
        ("what the best text has of the file", "tokens", {"claim": "parity"}),
        ("perplexity of the texts, each read alone", "", {"better": "lower", "claim": "parity"}),
    )
    for place, (metric, unit, more) in enumerate(rows):
        ours, theirs = ([each[place] for each in values[kind]] for kind in KINDS)
        told = {"metric": metric, "unit": unit, "papers": (399,), **more}
        bench.compared(subject="superposed", peer="drawn", setting=setting, values=ours, peer_values=theirs, **told)
