"""Choosing the next tokens of many sequences at once, on the device."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.ops.cuts import draw_cut, draw_uncut
from penstock.serve.choose.asked import Asked, Ruled
from penstock.serve.choose.logprobs import Logprobs
from penstock.serve.choose.penalties import Penalties, Tentative
from penstock.serve.choose.window import accept_path, accept_prefix, last_of

if TYPE_CHECKING:
    from penstock.serve.choose.proposals import Proposals


class Drawn(NamedTuple):
    """What a graph has chosen already, where nothing changes the scores: ``tokens`` int64 [R], and of those what
    :attr:`Asked.wanted` says, as a :func:`table <penstock.ops.logprobs.wanted_table>`."""

    tokens: Tensor
    told: Tensor


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What was chosen.

    Attributes:
        tokens: int64 [R], for each scored row.
        logprobs: of those of the R tokens for which they are wanted, in order; None where none are.
        prompt: of the prompt's tokens for which they are wanted, in order; None where none are.
        counts: int64 [S], how many of its rows' tokens each sequence takes; None where each has one row, and takes it.
        ready: when a copy to the host is there; None where nothing is copied.
        order: int64 [R], on the device, the rows that the tokens were chosen in, where trees were verified: the tokens
            that a sequence takes are the first of its rows all the same.
        weighed: what came of each :attr:`~penstock.ops.paged.contract.PagedBatch.weighed`, in order.
    """

    tokens: Tensor
    logprobs: Logprobs | None = None
    prompt: Logprobs | None = None
    counts: Tensor | None = None
    ready: torch.cuda.Event | None = None
    order: Tensor | None = None
    weighed: tuple[Tensor, ...] = ()

    def to_host(self) -> Sampled:
        """The same on the host. On CUDA the copy is only queued: :meth:`wait` before it is read."""
        if self.tokens.device.type == "cpu":
            return self
        tokens = self.tokens.to("cpu", non_blocking=True)
        counts = None if self.counts is None else self.counts.to("cpu", non_blocking=True)
        logprobs, prompt = (each and each.to_host() for each in (self.logprobs, self.prompt))
        weighed = tuple(each.to("cpu", non_blocking=True) for each in self.weighed)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.tokens.device))  # which to find out without the device takes long
        return Sampled(tokens, logprobs, prompt, counts, ready, weighed=weighed)

    def settled(self, sequences: int) -> list[int]:
        """How many tokens each of so many ``sequences`` takes."""
        return [1] * sequences if self.counts is None else self.counts.tolist()

    def wait(self) -> Sampled:
        """Waits until the values are there, and gives them."""
        if self.ready is not None:
            self.ready.synchronize()
        return self


class Sampler:
    """Chooses tokens for the sequences in an engine's slots. What a row is given does not depend on the others, not
    even by rounding.

    Args:
        slots: how many there are.
        vocabulary: how many tokens there are.
        device: of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._penalties = Penalties(slots, vocabulary, device)

    def place(self, slot: int, tokens: np.ndarray, prompt: int) -> None:
        """A sequence with these ``tokens``, the first ``prompt`` of which were given, takes ``slot``. None at all says
        that it is not penalized."""
        self._penalties.drop(slot)
        if len(tokens):
            self._penalties.add(slot, tokens, prompt)

    def sample(
        self, logits: Tensor, asked: Asked, drawn: Drawn | None = None, proposals: Proposals | None = None
    ) -> tuple[Sampled, Tensor]:
        """The next tokens, given ``logits`` [R, V] of the rows that ``asked``, or what was ``drawn`` from them for
        these draws, and what tentative tokens were drawn from; and the newest one of each sequence, [S]."""
        rows = asked.rows
        if drawn is not None and asked.plain:
            # What a verifier changes is not what the graph has told of.
            scores, tokens = logits, drawn.tokens if proposals is None else drawn.tokens.clone()
        else:
            scores = self._rescored(logits, asked) if rows["rescored"].any() else logits
            tokens = self._choose(scores, asked)
        if proposals is not None and asked.window is not None:
            proposals.settle(scores, asked, tokens)
        if asked.followers is not None:
            followers, leaders = self._of(asked.followers)
            tokens[followers] = tokens[leaders]
        counts = order = None
        if asked.window is not None:
            first, window = self._of(asked.first), self._of(asked.window)
            if asked.parents is None:
                counts = accept_prefix(tokens, first, window)
            else:
                counts, order = accept_path(tokens, first, window, self._of(asked.parents))
                tokens = tokens[order]
        self._remember(tokens, counts, asked)
        newest = tokens if counts is None else last_of(tokens, self._of(asked.first), counts)
        told = np.flatnonzero(rows["alternatives"] >= 0)
        if not told.size:
            return Sampled(tokens, counts=counts, order=order), newest
        most, own = int(rows["alternatives"].max()), tokens
        if drawn is not None and tokens is drawn.tokens:
            return Sampled(tokens, Logprobs(drawn.told, told, most), counts=counts), newest
        if order is not None or told.size < len(rows):  # else there is nothing to copy
            index = self._of(told)
            logits, own = logits[index if order is None else order[index]], tokens[index]
        wanted = rows["spread"][told]
        spread = self._of(wanted) if wanted.any() else None
        return Sampled(tokens, self._told(logits, own, most, spread), counts=counts, order=order), newest

    def _told(self, logits: Tensor, tokens: Tensor, most: int, spread: Tensor | None) -> Logprobs:
        return Logprobs.of(logits, tokens, most, spread)

    def _choose(self, scores: Tensor, asked: Asked) -> Tensor:
        """A token for each row of ``scores`` [R, V]."""
        greedy = asked.rows["temperature"] == 0
        if greedy.all():
            return scores.argmax(-1)
        if scores.is_cuda or not greedy.any():
            return self._drawn(scores, asked.draws)
        # On a CPU, the largest is found much faster than a token is drawn.
        tokens, others = scores.argmax(-1), self._of(np.flatnonzero(~greedy))
        tokens[others] = self._drawn(scores[others], asked.draws[:, ~greedy])
        return tokens

    def foretold(self, logits: Tensor, asked: Asked, rows: np.ndarray) -> Tensor:
        """The tokens that some of the ``rows`` of what is ``asked``, int64 [K], will be given, by their ``logits``
        [K, V], if nothing changes these."""
        tokens, drawn = logits.argmax(-1), np.flatnonzero(asked.rows["temperature"][rows] > 0)
        if drawn.size:
            tokens[self._of(drawn)] = self._drawn(logits[self._of(drawn)], asked.draws[:, rows[drawn]])
        return tokens

    def _drawn(self, scores: Tensor, draws: np.ndarray) -> Tensor:
        """Tokens that are drawn from ``scores`` [R, V], as ``draws`` [5, R] say."""
        _, top_k, top_p, min_p, _ = draws
        cut = ((top_k > 0) | (top_p < 1) | (min_p > 0)).any()
        return (draw_cut if cut else draw_uncut)(scores, self._of(draws))

    def _rescored(self, logits: Tensor, asked: Asked) -> Tensor:
        """The scores after bias, penalties, bans, grammars and rules. The logits stay as they are."""
        scores = logits.to(torch.float32, copy=True)
        if asked.biases is not None:
            biases = asked.biases
            scores[self._of(biases.rows), self._of(biases.tokens)] += self._of(biases.values)
        self._charge(scores, asked)
        if asked.bans is not None:
            scores.index_put_(tuple(self._of(asked.bans)), scores.new_full((), -torch.inf))
        if asked.masks is not None:
            words, index = self._of(asked.masks.words), self._of(asked.masks.rows)
            bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=self._device)
            forbidden = (bits & 1 == 0).flatten(1)[:, : scores.shape[-1]]
            scores[index] = scores[index].masked_fill(forbidden, -torch.inf)
        for ruled in asked.rules:
            self._rule(scores, ruled)
        return scores

    def _rule(self, scores: Tensor, ruled: Ruled) -> None:
        rows = self._of(ruled.rows)
        if ruled.rule.follows:
            known = {name: self._of(values) for name, values in ruled.known.items()}
            scores[rows[:, 0]] = ruled.rule.rescore(scores[rows[:, 0]], **known)
        else:
            scores[rows[:, 0]] = ruled.rule.combine(scores[rows])

    def _charge(self, scores: Tensor, asked: Asked) -> None:
        """Applies penalties. A row behind tentative tokens is charged for these too: those on its way are put into the
        books, those that are on no other's way are taken out again."""
        own = np.flatnonzero(asked.rows["penalized"])
        if not own.size:
            return
        slots, lengths, charges = asked.slots[own], asked.lengths[own], asked.rows["charges"][own]
        longest = int(lengths.max())
        if asked.window is None:
            self._penalties.apply(scores, self._of(own), slots, longest, charges)
            return
        tentative = Tentative(self._penalties, self._of)
        numbers = own - asked.first[asked.owners[own]]
        for number in range(int(numbers.max()) + 1):
            # Of each sequence one row at a time.
            at = numbers == number
            ways = [asked.ahead(row) for row in own[at].tolist()]
            tentative.stand(slots[at], lengths[at] - asked.depths[own[at]], ways)
            self._penalties.apply(scores, self._of(own[at]), slots[at], longest, charges[at])
        tentative.end()

    def _remember(self, tokens: Tensor, counts: Tensor | None, asked: Asked) -> None:
        """Penalized sequences go on by the ``tokens`` [R] that were settled, the first of their rows."""
        own = np.flatnonzero(asked.rows["penalized"])
        if not own.size:
            return
        owners = asked.owners[own]
        numbers = own - asked.first[owners]
        kept = None if counts is None else self._of(numbers) < counts[self._of(owners)]
        lengths = asked.lengths[asked.first[owners]] + numbers
        self._penalties.append(asked.slots[own], lengths, tokens[self._of(own)], kept)

    def _of(self, values: np.ndarray) -> Tensor:
        return upload(values, self._device)
