"""Runs batches on the device."""

from __future__ import annotations

import numpy as np
import torch

from penstock.models.decoder import Decoder
from penstock.ops.paged.contract import PagedBatch, PagedCache
from penstock.serve.batch import Batch
from penstock.serve.context import PagedTokens
from penstock.serve.sampler import Sampler


class Runner:
    """A model with its cache, and a row in its tables for each running sequence.

    Nothing here waits for the device: the token that a sequence goes on with is kept there, by slot.

    Args:
        model: the decoder, on the cache's device.
        cache: the memory of keys and values.
        slots: most sequences at a time.
        context: most tokens of a sequence.
    """

    def __init__(self, model: Decoder, cache: PagedCache, slots: int, context: int) -> None:
        self.model, self.cache = model, cache
        self.device = cache.shape.device
        self.sampler = Sampler(slots, self.device)
        self.tables = np.zeros((slots, -(-context // cache.shape.block_size)), np.int32)
        self._newest = torch.zeros(slots, dtype=torch.int64, device=self.device)

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
        context = PagedTokens(self._on_device(positions), self.cache)
        self.cache.plan(self._plan(slots, starts + counts, ends, rows, positions))
        hidden = self.model(self._tokens(batch, ends), context).hidden
        scored = [(entry, end) for entry, end in zip(entries, ends.tolist(), strict=True) if entry.scored]
        if scored:
            last = self._on_device(np.array([end - 1 for _, end in scored]))
            batch.sampled = self.sampler.sample(
                self.model.logits(hidden[last]),
                [entry.slot for entry, _ in scored],
                [entry.start + entry.count - entry.sequence.prompt for entry, _ in scored],
            )
            self._newest[self._on_device(np.array([entry.slot for entry, _ in scored]))] = batch.sampled.tokens

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

    def _tokens(self, batch: Batch, ends: np.ndarray) -> torch.Tensor:
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

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
