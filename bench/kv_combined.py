"""Eviction, codec and tier together: loss of what follows, requests at a time and tokens a second in the same bytes.

smollm2 serves from a pool of so many bytes, with each of three policies, of which two keep a quarter of the tokens, in
each of three codecs, with and without the host's memory for what is evicted. A pool in fewer bits has more tokens, and
a compressed cache takes fewer of them. Every prompt comes twice, the second time when others have driven it out, as far
as the pool has no room for all: then it is computed again, or comes back from the host's memory. The loss is measured
as `bench kv` does, by the same texts and budget, over a cache in the codec; the host's memory changes nothing of it,
since blocks come back bit for bit.

Beside all of them stands the full cache in bf16, without the host's memory. The kernel reads bf16 and int8; int4 goes
through the readable backend, so its tokens a second say what it costs here, and not what the precision would.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.core.garbage import settled
from penstock.models import hub
from penstock.models.decoder import Decoder
from penstock.ops.paged.codecs.bf16 import Bf16
from penstock.ops.paged.codecs.contract import Codec
from penstock.ops.paged.codecs.int4 import Int4
from penstock.ops.paged.codecs.int8 import Int8
from penstock.serve.config import EngineConfig
from penstock.serve.engine.engine import Engine
from penstock.serve.opening import dtype_of

kv = load("kv")

MODEL, QUICK_MODEL, BUDGET = "smollm2", "python-6m", 0.25
POLICIES = ("full", "h2o", "snapkv")
CODECS: dict[str, Codec] = {"bf16": Bf16(), "int8": Int8(), "int4": Int4()}
#: Bytes of the host's memory: all that is evicted fits.
HOST = 10**8
#: The pool has the bytes of so many tokens in bf16.
WORK = kv.Served(requests=12, length=192, output=24, pool=512, sequences=32, tokens=1024)
QUICK = kv.Served(requests=4, length=64, output=40, pool=256, sequences=32, tokens=256)


class Kind(NamedTuple):
    """A policy and a codec."""

    policy: str
    codec: str

    @property
    def name(self) -> str:
        return f"{self.policy}, {self.codec}"

    @property
    def options(self) -> dict[str, Any]:
        """What an engine is opened with."""
        kept = {"name": "full"} if self.policy == "full" else kv.policies(BUDGET)[self.policy]
        return {"kv": kept, "codec": CODECS[self.codec].describe()}

    def share(self, model: Decoder) -> float:
        """The bytes that are left of a long prompt's cache, of those of the full one in bf16."""
        size = model.config.head_dim
        own, whole = (each.vector_bytes(size, model.like.dtype) for each in (CODECS[self.codec], Bf16()))
        return (1.0 if self.policy == "full" else BUDGET) * own / whole


KINDS = [Kind(*each) for each in itertools.product(POLICIES, CODECS)]
PLAIN = KINDS[0]


def losses(bench: Bench, name: str, model: Decoder) -> None:
    """How well each kind goes on with texts, beside the full cache in bf16."""
    read, follow, count = (96, 48, 2) if bench.quick else (kv.READ, kv.FOLLOW, kv.TEXTS)
    todo = kv.texts(name, count, read + follow)
    found = {each: kv.losses(kv.opened(model, each.options, 4 * (read + follow)), todo, read) for each in KINDS}
    for each in KINDS[1:]:
        bench.compared(
            subject=each.name,
            peer=PLAIN.name,
            setting=f"{name}, {read} tokens read, {each.share(model):.0%} of the bytes kept",
            metric="loss of what follows",
            unit="nats/token",
            better="lower",
            values=found[each],
            peer_values=found[PLAIN],
            claim="parity",
        )


def opened(model: Decoder, kind: Kind, work: kv.Served, host: int) -> Engine:
    """An engine with the pool of ``work``, and so many bytes of the host's memory."""
    size, dtype = model.config.head_dim, model.like.dtype
    cached = work.pool * Bf16().vector_bytes(size, dtype) // CODECS[kind.codec].vector_bytes(size, dtype)
    tier = {"kv_host": host} if host else {}
    return kv.opened(model, {**kind.options, **tier}, cached, work.sequences, work.tokens)


def figures(model: Decoder, kind: Kind, work: kv.Served, host: int) -> tuple[float, float, int]:
    """Tokens a second of an engine that is warm, requests at a time, and blocks that came back."""
    engine, prompts = opened(model, kind, work, host), work.prompts()
    kv.served(engine, [prompt[::-1] for prompt in prompts[:2]], 2)
    before, _ = engine.snapshot().tier_hits
    with settled():
        rate, together = kv.served(engine, prompts + prompts, work.output)
    after, _ = engine.snapshot().tier_hits
    engine.close()
    return rate, together, after - before


def throughput(bench: Bench, name: str, model: Decoder) -> None:
    """What comes out of the same bytes with each kind, with and without the host's memory."""
    work = QUICK if bench.quick else WORK
    prompts = f"{work.requests} prompts of {work.length} + {work.output} tokens, each twice"
    served, plain = f"{name}, {prompts}, a pool with the bytes of {work.pool} in bf16", None
    for host in (0, HOST):
        setting = served + (f", {HOST // 10**6} MB of the host's memory" if host else "")
        for each in KINDS:
            rate, together, back = figures(model, each, work, host)
            plain = plain or rate
            row = {"metric": "serving throughput", "unit": "tokens/s"}
            if host or each != PLAIN:
                peer = {"peer": PLAIN.name, "peer_values": [plain]}
                bench.compared(subject=each.name, setting=setting, values=[rate], **row, **peer)
            bench.row(subject=each.name, setting=setting, metric="requests at a time", unit="", value=together)
            if host:
                bench.row(subject=each.name, setting=setting, metric="blocks that came back", unit="", value=back)


def main(bench: Bench) -> None:
    """Measures on the CPU.

    Raises:
        UsageError: it is to run elsewhere.
    """
    if bench.device.type != "cpu":
        raise UsageError("the benchmark kv_combined runs on the CPU", hint="Leave --device out, or say --device cpu.")
    name = QUICK_MODEL if bench.quick else MODEL
    model = hub.load(name, device=bench.device, dtype=dtype_of(EngineConfig(), bench.device)).eval()
    losses(bench, name, model)
    throughput(bench, name, model)
