"""Runs batches on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.core.progress import Reporter, silent
from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder, Output
from penstock.ops.paged.contract import PagedBatch, PagedCache
from penstock.serve.batch import Batch, Entry
from penstock.serve.context import PagedTokens
from penstock.serve.graphs import DecodeGraphs
from penstock.serve.logprobs import Logprobs
from penstock.serve.sampler import Sampled, Sampler

#: Prompt tokens whose log-probabilities are computed at a time: their scores are in memory together.
RATED = 256


class Runner:
    """A model with its cache, and a row in its tables for each running sequence.

    Nothing here waits for the device: the token that a sequence goes on with is kept there, by slot, and what is
    published is copied from there as soon as it is known.

    Args:
        model: the decoder, on the cache's device.
        cache: the memory of keys and values. Its last block is the runner's own.
        slots: most sequences at a time.
        context: most tokens of a sequence.

    Attributes:
        blocks: how many blocks sequences may use.
        tables: int32 [slots, most blocks], the blocks of each slot's sequence.
    """

    def __init__(self, model: Decoder, cache: PagedCache, slots: int, context: int) -> None:
        self.model, self.cache = model, cache
        self.device = cache.shape.device
        self.sampler = Sampler(slots, model.config.vocabulary, self.device)
        self.blocks = cache.shape.blocks - 1
        self.tables = np.zeros((slots, -(-context // cache.shape.block_size)), np.int32)
        self._newest = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._model: Callable[[Tensor, AttentionContext], Output] = model
        self._graphs: DecodeGraphs | None = None

    def warm_up(self, report: Reporter = silent) -> None:
        """Compiles the pass, and captures decoding steps as graphs. Without it, everything runs eagerly."""
        self._model = torch.compile(self.model, dynamic=True)
        self._graphs = DecodeGraphs(
            lambda tokens, positions: self.model.logits(self._hidden(tokens, positions)),
            self.cache,
            sequences=self.tables.shape[0],
            pages=self.tables.shape[1],
            padding=self.blocks,
        )
        sizes = self._graphs.sizes
        with report("compiling and capturing", len(sizes), "graphs") as bar:
            for size in reversed(sizes):
                self._graphs.capture(size)
                bar.advance()

    def _hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self._model(tokens, PagedTokens(positions, self.cache)).hidden

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Queues the forward pass and the sampling of ``batch``, whose ``sampled`` it sets."""
        entries = batch.entries
        slots = np.fromiter((entry.slot for entry in entries), np.int64, len(entries))
        starts = np.fromiter((entry.start for entry in entries), np.int64, len(entries))
        counts = np.fromiter((entry.count for entry in entries), np.int64, len(entries))
        ends = counts.cumsum()
        rows = np.repeat(np.arange(len(entries)), counts)
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - starts, counts)
        plan = self._plan(slots, starts + counts, ends, rows, positions)
        scored = np.fromiter((entry.scored > 0 for entry in entries), bool, len(entries))
        logits, hidden = self._logits(self._tokens(batch, ends), self._on_device(positions), plan, (ends - 1)[scored])
        prompt = self._rated(entries, ends - counts, hidden)
        if logits is not None:
            own = [entry for entry in entries if entry.scored]
            sampled = self.sampler.sample(
                logits,
                [entry.slot for entry in own],
                [entry.start + entry.count - entry.sequence.prompt for entry in own],
            )
            self._newest[self._on_device(slots[scored])] = sampled.tokens
            batch.sampled = dataclasses.replace(sampled, prompt=prompt).to_host()
        elif prompt is not None:
            batch.sampled = Sampled(prompt.tokens[:0], prompt=prompt).to_host()

    def _rated(self, entries: list[Entry], begins: np.ndarray, hidden: Tensor | None) -> Logprobs | None:
        """The log-probabilities of those tokens of prompts for which they are wanted."""
        rated = [(entry, begin) for entry, begin in zip(entries, begins.tolist(), strict=True) if entry.rated]
        if hidden is None or not rated:
            return None
        rows = np.concatenate([begin + np.arange(entry.rated) for entry, begin in rated])
        following = [entry.sequence.tokens[entry.start + 1 : entry.start + 1 + entry.rated] for entry, _ in rated]
        most = max(entry.sequence.sampling.prompt_logprobs or 0 for entry, _ in rated)
        pairs = zip(
            torch.split(self._on_device(rows), RATED),
            torch.split(self._on_device(np.concatenate(following)), RATED),
            strict=True,
        )
        return Logprobs.joined([Logprobs.of(self.model.logits(hidden[own]), tokens, most) for own, tokens in pairs])

    def _logits(
        self, tokens: Tensor, positions: Tensor, plan: PagedBatch, rows: np.ndarray
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scores of the tokens after those in ``rows``, None where no row is asked for, and the hidden states of all
        tokens, None where each is in ``rows`` and nothing else can be asked of it."""
        decoding = plan.longest == 1 and len(rows) == tokens.shape[0]
        if decoding and self._graphs is not None:
            size = self._graphs.size_for(len(rows))
            if size is not None:
                return self._graphs.replay(size, tokens, positions, plan), None
        self.cache.plan(plan)
        hidden = self._hidden(tokens, positions)
        return self.model.logits(hidden[self._on_device(rows)]) if len(rows) else None, hidden

    def _plan(
        self, slots: np.ndarray, lengths: np.ndarray, ends: np.ndarray, rows: np.ndarray, positions: np.ndarray
    ) -> PagedBatch:
        size = self.cache.shape.block_size
        tables = self.tables[slots, : -(-int(lengths.max()) // size)]
        starts = np.concatenate([[0], ends])
        return PagedBatch(
            starts=torch.from_numpy(starts.astype(np.int32)),
            lengths=torch.from_numpy(lengths.astype(np.int32)),
            tables=torch.from_numpy(tables),
            slots=torch.from_numpy(tables[rows, positions // size].astype(np.int64) * size + positions % size),
            longest=int(np.diff(starts).max()),
        )

    def _tokens(self, batch: Batch, ends: np.ndarray) -> Tensor:
        """The batch's tokens; those that are not known here yet come from the device."""
        known: list[int] = []
        unknown, sources = [], []
        for entry, end in zip(batch.entries, ends.tolist(), strict=True):
            own = entry.sequence.tokens[entry.start : entry.start + entry.count]
            if len(own) < entry.count:
                unknown.append(end - 1)
                sources.append(entry.slot)
                own.append(0)
            known += own
        tokens = self._on_device(np.array(known))
        if unknown:
            tokens[self._on_device(np.array(unknown))] = self._newest[self._on_device(np.array(sources))]
        return tokens

    def _on_device(self, values: np.ndarray) -> Tensor:
        return upload(values, self.device)
