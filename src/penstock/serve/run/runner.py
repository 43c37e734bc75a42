"""Runs batches on the device."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.core.garbage import settled
from penstock.core.progress import Reporter, silent
from penstock.models.attention import AttentionContext
from penstock.models.decoder import Decoder
from penstock.ops.draw import draw_softmax
from penstock.ops.paged.contract import PagedBatch, PagedCache
from penstock.serve.choose.logprobs import Logprobs
from penstock.serve.choose.sampler import Asked, Sampled, Sampler
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.run.context import PagedTokens
from penstock.serve.run.graphs import StepGraphs, decode_shapes, prompt_shapes, seconds, worth_replaying

#: Prompt tokens whose log-probabilities are computed at a time: their scores are in memory together.
RATED = 256


@dataclasses.dataclass(frozen=True)
class Part:
    """A pass through the model, which computes some neighbouring entries of a batch.

    Attributes:
        inputs: int64 [3, N]: the tokens, or 0; where the others stand in the runner's list of newest ones, or 0; and
            their positions.
        plan: where they belong.
        scored: rows after which the scores of the next token are wanted.
        rated: rows after which the log-probability of the prompt's next token is.
        draws: int64 [3, S], of the S scored ones: how the next token would be drawn, as float64, if its sequence asked
            for nothing special; and where it belongs in the list of newest ones.
    """

    inputs: np.ndarray
    plan: PagedBatch
    scored: np.ndarray
    rated: np.ndarray
    draws: np.ndarray

    @property
    def decoding(self) -> bool:
        """Whether each token is the only one of its sequence, and the next is wanted."""
        return self.plan.own_shape.others == 0 and len(self.scored) == self.inputs.shape[1]


@dataclasses.dataclass(frozen=True)
class Passed:
    """What came of a part: ``logits`` of its scored rows and hidden states of its ``rated`` ones, None without such;
    and the next tokens, where they are ``drawn`` already."""

    logits: Tensor | None
    rated: Tensor | None = None
    drawn: Tensor | None = None


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
        # Of slot s at s + 1; what stands at 0 is of no meaning.
        self._newest = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        self._trunk: Callable[[Tensor, AttentionContext], tuple[Tensor, Tensor]] = model.trunk
        self._tip: Callable[[Tensor, Tensor], Tensor] = model.tip
        self._decodes: StepGraphs | None = None
        self._prompts: StepGraphs | None = None
        self._place: tuple[Tensor, ...] = ()

    @functools.cached_property
    def _side(self) -> torch.cuda.Stream:
        """Where the part of a batch that leads is computed, beside the others."""
        return torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]

    def warm_up(self, tokens: int, report: Reporter = silent) -> None:
        """Compiles the pass, and captures steps as graphs: those that decode, and those with up to ``tokens`` tokens of
        prompts that are computed as fast as they are queued. Without it, everything runs eagerly."""
        self._trunk = torch.compile(self.model.trunk, dynamic=True)
        self._tip = torch.compile(self.model.tip, dynamic=True)
        sequences, pages = self.tables.shape
        common: dict[str, Any] = {"pages": pages, "padding": self.blocks, "pool": torch.cuda.graph_pool_handle()}
        prompts = StepGraphs(self._begun_in_place, 3, self.cache, **common)
        decodes = StepGraphs(self._decoded, 6, self.cache, **common)
        timed = functools.partial(seconds, self._begun, 3, self.cache, self.blocks)
        alone = decode_shapes(sequences)
        with report("compiling", 1, "model") as bar:
            # Kernels are chosen for the first size that they meet.
            timed(alone[-1])
            bar.advance()
        beside = worth_replaying(prompt_shapes(sequences, tokens), timed)
        with report("capturing", len(beside) + len(alone), "graph") as bar, settled():
            # Every capture makes a full collection.
            prompts.capture(beside, bar)
            decodes.capture(alone, bar)
        self._prompts, self._decodes = prompts, decodes

    def _begun(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the last layer needs to go on with any of the tokens with ``inputs`` int64 [3, N], as of a part."""
        known, places, positions = inputs
        tokens = torch.where(places > 0, self._newest[places], known)
        return self._trunk(tokens, PagedTokens(positions, self.cache))

    def _begun_in_place(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`_begun` gives, in the memory of the first time, which had the most rows: graphs have none of
        their own."""
        begun = self._begun(inputs)
        self._place = self._place or begun
        return tuple(place[: len(new)].copy_(new) for place, new in zip(self._place, begun, strict=True))

    def _decoded(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and the tokens that are drawn from them, of sequences that decode. ``inputs`` int64 [6, N] are a
        part's and its draws. The tokens are put where the next step finds them."""
        logits = self.model.logits(self._tip(*self._begun(inputs[:3])))
        tokens = draw_softmax(logits, *inputs[3:5].view(torch.float64))
        self._newest.index_copy_(0, inputs[5], tokens)
        return logits, tokens

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Queues the forward passes and the sampling of ``batch``, whose ``sampled`` it sets."""
        own = [entry for entry in batch.entries if entry.scored]
        asked = self.sampler.ask(
            [entry.slot for entry in own], [entry.start + entry.count - entry.sequence.prompt for entry in own]
        )
        passed = self._pass_all(self._parts(batch, asked), batch.lead)
        logits = _joined([each.logits for each in passed])
        prompt = self._rated(batch.entries, _joined([each.rated for each in passed]))
        if logits is not None:
            ready = all(each.drawn is not None for each in passed)
            drawn = _joined([each.drawn for each in passed]) if ready else None
            sampled = self.sampler.sample(logits, asked, drawn)
            if sampled.tokens is not drawn:
                self._newest.index_copy_(0, self._on_device(asked.slots + 1), sampled.tokens)
            batch.sampled = dataclasses.replace(sampled, prompt=prompt).to_host()
        elif prompt is not None:
            batch.sampled = Sampled(prompt.tokens[:0], prompt=prompt).to_host()

    def _rated(self, entries: list[Entry], hidden: Tensor | None) -> Logprobs | None:
        """The log-probabilities of those tokens of prompts for which they are wanted, given the ``hidden`` states
        [R, hidden] before them."""
        if hidden is None:
            return None
        rated = [entry for entry in entries if entry.rated]
        following = [entry.sequence.tokens[entry.start + 1 : entry.start + 1 + entry.rated] for entry in rated]
        most = max(entry.sequence.sampling.prompt_logprobs or 0 for entry in rated)
        tokens = self._on_device(np.concatenate(following))
        pairs = zip(torch.split(hidden, RATED), torch.split(tokens, RATED), strict=True)
        return Logprobs.joined([Logprobs.of(self.model.logits(states), own, most) for states, own in pairs])

    def _pass_all(self, parts: List[Part], lead: int) -> list[Passed]:
        """Computes the ``parts``, at the same time where the device can."""
        if len(parts) == 1 or self.device.type != "cuda":
            return [self._pass(part) for part in parts]
        # Graphs share their memory, so only one part can replay one, and it has lane 0, where graphs are planned.
        replayed = next((index for index, part in enumerate(parts) if part.decoding), 0)
        others = (index for index in range(len(parts)) if index != replayed)
        lanes = {replayed: 0} | {index: lane for lane, index in enumerate(others, 1)}
        # What one stream allocates and the other uses cannot be dealt out again too early: the main stream's tensors
        # are held here until it has been told to wait for the side, and the side's are used by the main stream, which
        # the side waits for before it computes anything of the next batch.
        main, passed = torch.cuda.current_stream(self.device), {}
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            passed[lead] = self._pass(parts[lead], lanes[lead])
        for index, part in enumerate(parts):
            if index != lead:
                passed[index] = self._pass(part, lanes[index])
        main.wait_stream(self._side)
        return [passed[index] for index in range(len(parts))]

    def _pass(self, part: Part, lane: int = 0) -> Passed:
        count = part.inputs.shape[1]
        if part.decoding:
            replayed = self._replayed(self._decodes, part, lane, part.draws)
            if replayed is not None:
                logits, drawn = replayed[0]
                return Passed(logits[:count], drawn=drawn[:count])
        replayed = self._replayed(self._prompts, part, lane)
        if replayed is None:
            self.cache.plan(part.plan, lane)
            replayed = self._begun(self._on_device(part.inputs)), np.arange(count)
        begun, places = replayed

        def hidden(rows: np.ndarray) -> Tensor:
            index = self._on_device(places[rows])
            return self._tip(*(each[index] for each in begun))

        logits = self.model.logits(hidden(part.scored)) if len(part.scored) else None
        return Passed(logits, hidden(part.rated) if len(part.rated) else None)

    def _replayed(
        self, graphs: StepGraphs | None, part: Part, lane: int, *more: np.ndarray
    ) -> tuple[Any, np.ndarray] | None:
        """What one of the ``graphs`` gives for ``part``, with the inputs and ``more`` rows of them, and the rows of its
        tokens; None where none is for it."""
        shape = graphs.shape_for(part.plan) if graphs is not None and lane == 0 else None
        if graphs is None or shape is None:
            return None
        return graphs.replay(shape, np.concatenate([part.inputs, *more]), part.plan)

    def _parts(self, batch: Batch, asked: Asked) -> list[Part]:
        """The passes that compute ``batch``, whose scored entries ``asked`` for their next tokens."""
        entries = batch.entries
        fields = ((entry.slot, entry.start, entry.count, entry.scored, entry.rated) for entry in entries)
        slots, starts, counts, scored, rated = np.array(list(fields), np.int64).T
        ends = counts.cumsum()
        rows = np.repeat(np.arange(len(entries)), counts)
        offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        positions = offsets + np.repeat(starts, counts)
        wanted = offsets < np.repeat(rated, counts)
        inputs = np.stack([*self._tokens(batch, ends), positions])
        draws, ahead = (
            np.stack([*asked.draws.view(np.int64), asked.slots + 1]),
            np.concatenate([[0], (scored > 0).cumsum()]),
        )
        parts = []
        for first, last in itertools.pairwise(itertools.accumulate(batch.parts, initial=0)):
            begin, end = ends[first] - counts[first], ends[last - 1]
            own, all_own = slice(first, last), slice(begin, end)
            plan = self._plan(
                slots[own],
                (starts + counts)[own],
                ends[own] - begin,
                rows[all_own] - first,
                positions[all_own],
            )
            newest = (ends[own] - begin - 1)[scored[own] > 0]
            drawn = draws[:, ahead[first] : ahead[last]]
            parts.append(Part(inputs[:, all_own], plan, newest, np.flatnonzero(wanted[all_own]), drawn))
        return parts

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
        )

    def _tokens(self, batch: Batch, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The batch's tokens, and where those stand in the list of newest ones that are not known here yet; 0 in place
        of the others."""
        known: list[int] = []
        places = np.zeros(int(ends[-1]), np.int64)
        for entry, end in zip(batch.entries, ends.tolist(), strict=True):
            own = entry.sequence.tokens[entry.start : entry.start + entry.count]
            if len(own) < entry.count:
                places[end - 1] = entry.slot + 1
                own.append(0)
            known += own
        return np.array(known), places

    def _on_device(self, values: np.ndarray) -> Tensor:
        return upload(values, self.device)


def _joined(pieces: Iterable[Tensor | None]) -> Tensor | None:
    """The rows of all ``pieces`` that are there; None where there is none."""
    found = [piece for piece in pieces if piece is not None]
    return torch.cat(found) if len(found) > 1 else next(iter(found), None)
