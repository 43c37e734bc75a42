"""Policies of the cache beside kvpress, which has such rules for transformers: the same weights, texts and budget.

smollm2 reads the beginning of files of the standard library, the cache is compressed once, and the loss of what follows
is measured, as in `bench kv`. Where both have the same rule, the same tokens are kept, and perplexity has to agree to a
thousandth: sinks and the newest; the votes of the last queries, not averaged over neighbours; attention in sum, over
the same queries. Beside these stand the rules as each has them by default, which differ at the edges: kvpress averages
votes over neighbours that are not there, and divides the attention that a token drew by how many queries could see it.

kvpress needs another version of transformers. Make it a place of its own, and say where its Python is:

    python -m venv .kvpress && .kvpress/bin/pip install torch kvpress==0.5.5
    PENSTOCK_KVPRESS=.kvpress/bin/python penstock bench kv_peers
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from penstock.core.bench import Apart, Bench, peer_python
from penstock.core.errors import PenstockError
from penstock.data.corpora.stdlib import StandardLibrary
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.serve.build import build_engine
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.messages import Request

MODEL, READ, FOLLOW, TEXTS = "smollm2", 512, 128, 6
BUDGETS = (0.25, 0.5)
#: Queries that vote, and that sums of attention are of: the cache is compressed once it is that much beyond its budget.
WINDOW, SUMMED = 32, 192
#: The most by which perplexities may differ where the same tokens are kept.
EXACT = 1e-3


class Pair(NamedTuple):
    """A policy and a press: their options, and whether both keep the same tokens."""

    policy: dict[str, Any]
    press: dict[str, Any]
    same: bool


def pairs(read: int, budget: float) -> dict[str, Pair]:
    """What is compared where ``read`` tokens are compressed to the share ``budget`` of them."""
    count = int(read * budget)
    ratio = {"compression_ratio": 1 - count / read - 1e-9}
    # What follows stays in the cache.
    kept = {"budget": count, "every": min(SUMMED, read - count)}
    votes = {"name": "snapkv", "window": WINDOW, **kept}
    return {
        "sink_window": Pair(
            {"name": "sink_window", "sinks": 4, **kept}, {"kind": "streaming", "options": {"n_sink": 4, **ratio}}, True
        ),
        "snapkv, no neighbours": Pair(
            {**votes, "pool": 1},
            {"kind": "snapkv", "options": {"window_size": WINDOW, "kernel_size": 1, **ratio}},
            True,
        ),
        "snapkv": Pair(
            {**votes, "pool": 5},
            {"kind": "snapkv", "options": {"window_size": WINDOW, "kernel_size": 5, **ratio}},
            False,
        ),
        "h2o, heavy hitters alone": Pair(
            {"name": "h2o", "recent": 0.0, **kept},
            {"kind": "summed", "options": {"queries": kept["every"], **ratio}},
            True,
        ),
        "h2o": Pair({"name": "h2o", **kept}, {"kind": "observed", "options": ratio}, False),
    }


def texts(count: int, length: int) -> list[list[int]]:
    """The first tokens of files of the standard library."""
    tokenizer = hub.load_tokenizer(hub.resolve(MODEL))
    encoded = (tokenizer(each.text)["input_ids"][:length] for each in StandardLibrary(tests=True).documents())
    return list(itertools.islice((ids for ids in encoded if len(ids) == length), count))


def ours(model: Decoder, kv: dict[str, Any], todo: list[list[int]], read: int) -> list[float]:
    """Of each text, the mean loss in nats of the tokens behind the first ``read``; and each cache was compressed once,
    to the budget."""
    room = 2 * len(todo) * len(todo[0])
    engine = build_engine(
        model, EngineConfig.model_validate({"kv": kv, "cache_tokens": room, "sequences": 8, "tokens": 1024})
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=read)
    for number, text in enumerate(todo):
        engine.add(Request(str(number), text, sampling, given=read))
    rated: dict[str, list[float]] = {}
    while engine.busy:
        for delta in engine.step():
            if delta.prompt_logprobs is not None:
                rated[delta.id] = [-token.logprob for token in delta.prompt_logprobs]
    dropped, wanted = engine.snapshot().dropped_tokens, len(todo) * (read - int(kv["budget"]))
    if dropped != wanted:
        raise PenstockError(f"{dropped} tokens went out of caches that were to be compressed by {wanted}")
    return [statistics.fmean(rated[str(number)]) for number in range(len(todo))]


def main(bench: Bench) -> None:
    """Measures both, and fails where they differ though they keep the same tokens."""
    python = peer_python("kvpress", "PENSTOCK_KVPRESS")
    read, follow, count = (256, 48, 2) if bench.quick else (READ, FOLLOW, TEXTS)
    model = hub.load(MODEL, dtype=torch.float32).eval()
    todo = texts(count, read + follow)
    with tempfile.TemporaryDirectory() as folder:
        hub.save(model, Path(folder))
        for budget in BUDGETS[: 1 if bench.quick else None]:
            compared = pairs(read, budget)
            presses = {name: pair.press for name, pair in compared.items()}
            script = str(Path(__file__).parent / "peers" / "kvpress_losses.py")
            asked = {"folder": folder, "texts": todo, "read": read, "presses": presses}
            with Apart([python, script], "kvpress") as kvpress:
                told = kvpress.ask(asked)
            for name, pair in compared.items():
                _compare(
                    bench, name, pair, ours(model, pair.policy, todo, read), told, f"{read} read, {budget:.0%} kept"
                )


def _compare(bench: Bench, name: str, pair: Pair, own: list[float], told: dict[str, Any], where: str) -> None:
    other = told["presses"][name]
    if set(other["kept"]) != {pair.policy["budget"]}:
        raise PenstockError(f"kvpress keeps {other['kept']} tokens, and {pair.policy['budget']} are asked for")
    perplexities = [[math.exp(loss) for loss in each] for each in (own, other["losses"])]
    far = max(abs(one / another - 1) for one, another in zip(*perplexities, strict=True))
    if pair.same and far > EXACT:
        raise PenstockError(f"{name} keeps the same tokens as kvpress, and its perplexity is {far:.1e} away")
    bench.compared(
        subject=name,
        peer=f"kvpress {told['versions']['kvpress']}, {'the same rule' if pair.same else 'its own rule'}",
        setting=f"{MODEL}, {where}",
        metric="perplexity of what follows",
        unit="",
        better="lower",
        values=perplexities[0],
        peer_values=perplexities[1],
        claim="parity",
    )
    print(f"{name}: perplexities differ by {far:.1e} at most", file=sys.stderr)
