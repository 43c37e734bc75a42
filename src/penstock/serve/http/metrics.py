"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.core.events import Event
from penstock.serve.messages import Snapshot

QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineCollector(Collector):
    """An engine's newest state, what the ``memory`` of each rank's device is for, and the ``codec`` of its cache. Of
    several replicas, the figures of each have its number; ``memory`` has the ranks of one behind those of another."""

    def __init__(self, newest: Callable[[], Snapshot], memory: Sequence[Mapping[str, int]], codec: str) -> None:
        self._newest, self._memory, self._codec = newest, memory, codec

    def collect(self) -> Iterator[Metric]:
        now = self._newest()
        if not now.replicas:
            yield from self._families(now, self._memory)
            return
        found, ranks = dict[str, Metric](), len(self._memory) // len(now.replicas)
        for number, replica in enumerate(now.replicas):
            for family in self._families(replica.now, self._memory[number * ranks : (number + 1) * ranks]):
                own = [each._replace(labels={"replica": str(number), **each.labels}) for each in family.samples]
                family.samples = []
                found.setdefault(family.name, family).samples += own
        yield from found.values()
        yield from _replicas(now)

    def _families(self, now: Snapshot, ranks: Sequence[Mapping[str, int]]) -> Iterator[Metric]:
        """Of one engine, the memory of whose ``ranks`` is given."""
        gauges = {
            "running": ("Sequences that have memory.", now.running),
            "waiting": ("Sequences that wait for memory.", now.waiting),
            "cache_blocks": ("Blocks of the cache.", now.blocks),
            "cache_blocks_held": ("Blocks of the cache that sequences hold.", now.held),
            "cache_use_ratio": ("Share of the cache that sequences hold.", now.held / max(now.blocks, 1)),
            "prefix_hit_ratio": (
                "Share of all prompt tokens so far that were in the cache already.",
                now.cached_tokens / max(now.prompt_tokens, 1),
            ),
            "batch_tokens": ("Tokens of the last step.", now.batch_tokens),
            "batch_sequences": ("Sequences of the last step.", now.batch_sequences),
            "step_seconds": ("Duration of the last step.", now.step_seconds),
            "weights_version": ("Of the weights: 0 are those that the engine was opened with.", now.version),
            "paused": ("1 while requests wait since the engine is paused or asleep.", int(now.paused or now.asleep)),
        }
        counters = {
            "steps": ("Steps.", now.steps),
            "prompt_tokens": ("Tokens of prompts.", now.prompt_tokens),
            "cached_prompt_tokens": ("Tokens of prompts that were in the cache already.", now.cached_tokens),
            "output_tokens": ("Tokens that were generated.", now.output_tokens),
            "cache_hits": ("Full blocks of the sequences that were admitted, found in the cache.", now.hits),
            "cache_misses": ("Full blocks of the sequences that were admitted, not found there.", now.misses),
            "cache_evicted": ("Blocks that were evicted from the prefix tree.", now.evicted),
            "preemptions": ("Sequences that lost their memory and were computed again.", now.preemptions),
            "drafted_tokens": ("Tokens that were drafted.", now.drafted_tokens),
            "accepted_tokens": ("Tokens that were drafted and accepted.", now.accepted_tokens),
            "dropped_tokens": ("Tokens that went out of caches that were compressed.", now.dropped_tokens),
            "compress_seconds": (
                "Seconds that the host was at compressing caches; of a device's work, the time to queue it.",
                now.compress_seconds,
            ),
            "reused_tokens": ("Tokens of contexts that were in the cache by themselves.", now.reused_tokens),
            "renewed_tokens": ("Tokens of such contexts that were computed again.", now.renewed_tokens),
            "embedded_texts": ("Texts of which vectors were made.", now.embedded_texts),
            "embedded_tokens": ("Tokens of which vectors were made.", now.embedded_tokens),
            "sequence_steps": ("Steps that brought tokens, counted for each sequence.", now.sequence_steps),
        }
        for name, (help, value) in gauges.items():
            yield GaugeMetricFamily(f"penstock_{name}", help, value)
        for name, (help, value) in counters.items():
            yield CounterMetricFamily(f"penstock_{name}", help, value)
        depths = CounterMetricFamily(
            "penstock_drafts",
            "Tokens that were drafted, by their place behind the newest one.",
            labels=["place", "outcome"],
        )
        for place, (drafted, accepted) in enumerate(zip(now.drafted_at, now.accepted_at, strict=True), 1):
            depths.add_metric([str(place), "accepted"], accepted)
            depths.add_metric([str(place), "rejected"], drafted - accepted)
        yield depths
        held = GaugeMetricFamily("penstock_tier_bytes", "Blocks outside of the cache, by where.", labels=["tier"])
        back = CounterMetricFamily("penstock_tier_hits", "Blocks that came back, by from where.", labels=["tier"])
        for tier, size, hits in zip(("host", "disk"), now.tier_bytes, now.tier_hits, strict=True):
            held.add_metric([tier], size)
            back.add_metric([tier], hits)
        yield held
        yield back
        parts = GaugeMetricFamily(
            "penstock_memory_bytes",
            "Memory of each rank's device, by what it is for, as measured at the start.",
            labels=["use", "rank"],
        )
        for rank, memory in enumerate(ranks):
            for use, size in memory.items():
                parts.add_metric([use, str(rank)], size)
        yield parts
        codec = GaugeMetricFamily("penstock_cache_codec", "1, for the codec of the cache.", labels=["codec"])
        codec.add_metric([self._codec], 1)
        yield codec


def _replicas(now: Snapshot) -> Iterator[Metric]:
    """What there is to say of replicas beside the figures of their engines."""
    states = GaugeMetricFamily("penstock_replica_state", "1, for the state of a replica.", labels=["replica", "state"])
    sent = GaugeMetricFamily("penstock_replica_under_way", "Continuations that were sent there.", labels=["replica"])
    again = CounterMetricFamily("penstock_replica_restarts", "Starts after a death.", labels=["replica"])
    for number, each in enumerate(now.replicas):
        states.add_metric([str(number), each.state], 1)
        sent.add_metric([str(number)], each.under_way)
        again.add_metric([str(number)], each.restarts)
    yield states
    yield sent
    yield again
    yield CounterMetricFamily("penstock_resent", "Requests sent to another replica, as theirs was lost.", now.resent)


class ServerMetrics:
    """What a server measures.

    Attributes:
        queue: from a continuation's arrival at the engine until it first had memory.
        ttft: from a request's arrival, its prompt in tokens, to its first token.
        tpot: between tokens, the mean of each continuation.
        duration: from a request's arrival to the end of each continuation.
        outcomes: continuations by how they ended: a reason of the engine's, or ``error`` or ``disconnect``.
        refused: requests that were turned away since the queue was full.
    """

    def __init__(self, newest: Callable[[], Snapshot], memory: Sequence[Mapping[str, int]], codec: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(newest, memory, codec))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"penstock_{name}_seconds", help, buckets=buckets, registry=self._registry)

        self.queue = histogram("queue", "From arrival until there was memory.", QUEUE)
        self.ttft = histogram("time_to_first_token", "From arrival to the first token.", TTFT)
        self.tpot = histogram("time_per_output_token", "Between tokens, the mean of each continuation.", TPOT)
        self.duration = histogram("request_duration", "From arrival to the end.", WHOLE)
        self.outcomes = Counter(
            "penstock_finished", "Continuations by how they ended.", ["outcome"], registry=self._registry
        )
        self.refused = Counter("penstock_refused", "Requests turned away: the queue was full.", registry=self._registry)

        #: When those continuations arrived that have had no memory yet.
        self._queued: dict[tuple[str, int], float] = {}

    def see(self, events: Sequence[Event], snapshot: Snapshot | None) -> None:
        """Measures what was decided."""
        for event in events:
            if event.kind == "arrived":
                self._queued[event.id, event.index] = event.time
            elif event.kind in ("admitted", "finished"):
                since = self._queued.pop((event.id, event.index), None)
                if since is not None:
                    self.queue.observe(event.time - since)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
