"""Choosing the next tokens of many sequences at once, on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.core.randomness import derive, uniforms
from penstock.models.sampling import Sampling, draw, probabilities_of
from penstock.ops.draw import draw_softmax
from penstock.serve.choose.grammar import masks
from penstock.serve.choose.logprobs import Logprobs
from penstock.serve.choose.penalties import Penalties
from penstock.serve.engine.sequence import Sequence
from penstock.serve.messages import TokenLogprobs

#: Temperature and cuts of a row; top_k is 0 where there is none.
OPTIONS = [("temperature", "f8"), ("top_k", "i8"), ("top_p", "f8"), ("min_p", "f8")]

#: What the host keeps of a slot, besides: the key of its draws, the prompt's length, penalties, how long no token may
#: end the text, how many alternatives are told (-1: no log-probabilities), and what of a sequence has to be looked at.
SLOT = np.dtype(
    [
        *OPTIONS,
        ("key", "u8"),
        ("prompt", "i8"),
        ("charges", "f8", (3,)),
        ("least", "i8"),
        ("alternatives", "i8"),
        *((name, "?") for name in ("penalized", "biased", "grammar", "rule", "rescored", "led")),
    ]
)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What was chosen.

    Attributes:
        tokens: int64 [R].
        logprobs: of those of the R tokens for which they are wanted, in order; None where none are.
        prompt: of the prompt's tokens that were rated, in order; None where none were.
        ready: when a copy to the host is there; None where nothing is copied.
    """

    tokens: Tensor
    logprobs: Logprobs | None = None
    prompt: Logprobs | None = None
    ready: torch.cuda.Event | None = None

    def to_host(self) -> Sampled:
        """The same on the host. On CUDA the copy is only queued: :meth:`wait` before it is read."""
        if self.tokens.device.type == "cpu":
            return self
        tokens = self.tokens.to("cpu", non_blocking=True)
        logprobs, prompt = (each and each.to_host() for each in (self.logprobs, self.prompt))
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return Sampled(tokens, logprobs, prompt, ready)

    def told(self, alternatives: List[int | None]) -> list[list[TokenLogprobs] | None]:
        """The log-probabilities of each of the R tokens with so many ``alternatives`` [R]; None where not wanted."""
        if self.logprobs is None:
            return [None] * len(alternatives)
        records = iter(self.logprobs.records([most for most in alternatives if most is not None]))
        return [None if most is None else [next(records)] for most in alternatives]

    def wait(self) -> None:
        """Waits until the values are there."""
        if self.ready is not None:
            self.ready.synchronize()


@dataclasses.dataclass(frozen=True)
class Asked:
    """What some sequences want of their next tokens.

    Attributes:
        slots: int64 [R].
        counts: int64 [R], tokens that they have after their prompts.
        rows: SLOT [R], as it holds for this token.
        uniform: float64 [R], the draws.
    """

    slots: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    uniform: np.ndarray

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """int64 [R]: 0 for the most probable token, 1 for one of all; where some are cut off, more, by what does it."""
        rows = self.rows
        cuts = 1 + 2 * (rows["top_k"] > 0) + 4 * (rows["top_p"] < 1) + 8 * (rows["min_p"] > 0)
        return np.where(rows["temperature"] > 0, cuts, 0)

    @property
    def plain(self) -> bool:
        """Whether all tokens come from the logits as they are, by :attr:`draws`."""
        return not (self.rows["rescored"].any() or self.rows["led"].any()) and bool((self.kinds < 2).all())

    @property
    def draws(self) -> np.ndarray:
        """float64 [2, R]: temperature and uniform number of each, as :func:`draw_softmax` wants them, where none of the
        tokens is cut off."""
        temperature = self.rows["temperature"]
        return np.stack([temperature, np.where(temperature > 0, self.uniform, 0)])


class Sampler:
    """Chooses tokens for the sequences in the runner's slots. What a row is given does not depend on the others, not
    even by rounding: rows are computed together only where they ask for the same cuts.

    Args:
        slots: how many there are.
        vocabulary: how many tokens there are.
        device: of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._device = device
        self._table = np.zeros(slots, SLOT)
        self._sequences: list[Sequence | None] = [None] * slots
        self._biases: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._penalties = Penalties(slots, vocabulary, device)

    def add(self, slot: int, sequence: Sequence) -> None:
        """``sequence``, whose tokens are all known, takes ``slot``."""
        sampling, row = sequence.sampling, self._table[slot]
        self._sequences[slot] = sequence
        _set_options(row, sampling)
        row["key"], row["prompt"] = derive(sampling.seed, "sample"), sequence.prompt
        row["charges"] = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        row["least"] = sampling.min_tokens
        row["alternatives"] = -1 if sampling.alternatives is None else sampling.alternatives
        row["penalized"], row["biased"] = sampling.penalized, bool(sampling.logit_bias)
        row["grammar"], row["rule"] = sequence.matcher is not None, sampling.rule is not None
        row["led"] = sequence.leader is not None
        special = sampling.penalized or sampling.logit_bias or sampling.min_tokens or sampling.blind
        row["rescored"] = bool(special) or sequence.companion is not None
        if sampling.logit_bias:
            tokens, added = zip(*sampling.logit_bias.items(), strict=True)
            self._biases[slot] = np.array(tokens, np.int64), np.array(added, np.float32)
        self._penalties.drop(slot)
        if sampling.penalized:
            self._penalties.add(slot, sequence.tokens, sequence.prompt)

    def ask(self, slots: List[int], counts: List[int]) -> Asked:
        """What the sequences in ``slots`` [R] want, which have ``counts`` [R] tokens after their prompts already. Their
        draws depend on the sequence's seed and its count alone."""
        where, count = np.array(slots, np.int64), np.array(counts, np.int64)
        rows = self._table[where]
        for place in np.flatnonzero(rows["rule"]):
            sampling = self._sequence(where[place]).sampling
            assert sampling.rule is not None
            _set_options(rows[place], sampling.rule.options(sampling, int(count[place])))
        return Asked(where, count, rows, uniforms(rows["key"], count))

    def sample(self, logits: Tensor, asked: Asked, drawn: Tensor | None = None) -> Sampled:
        """The next tokens, given ``logits`` [R, V] of the sequences that ``asked``, or tokens ``drawn`` [R] from them
        for these draws. A companion is there whenever its leader is, and is given the same token."""
        where, rows = asked.slots, asked.rows
        if drawn is not None and asked.plain:
            tokens = drawn
        else:
            tokens = self._choose(self._rescored(logits, asked) if rows["rescored"].any() else logits, asked)
        if rows["led"].any():
            companions = np.flatnonzero(rows["led"])
            leaders = [_place(where, self._sequence(slot).leader) for slot in where[companions]]
            tokens[self._of(companions)] = tokens[self._of(np.array(leaders))]
        charged = np.flatnonzero(rows["penalized"])
        if charged.size:
            lengths = (rows["prompt"] + asked.counts)[charged]
            self._penalties.append(where[charged], lengths, tokens[self._of(charged)])
        told = np.flatnonzero(rows["alternatives"] >= 0)
        if not told.size:
            return Sampled(tokens)
        index, most = self._of(told), int(rows["alternatives"].max())
        return Sampled(tokens, Logprobs.of(logits[index], tokens[index], most))

    def _choose(self, scores: Tensor, asked: Asked) -> Tensor:
        """A token for each row of ``scores`` [R, V]."""
        rows, kinds = asked.rows, asked.kinds
        distinct = np.unique(kinds)
        if len(distinct) == 1:
            return self._drawn(scores, rows, asked.uniform)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        for kind in distinct:
            own = np.flatnonzero(kinds == kind)
            index = self._of(own)
            tokens[index] = self._drawn(scores[index], rows[own], asked.uniform[own])
        return tokens

    def _drawn(self, scores: Tensor, rows: np.ndarray, uniform: np.ndarray) -> Tensor:
        """The same for rows that all ask for the same cuts, or are all greedy."""
        first = rows[0]
        if first["temperature"] == 0:
            return scores.argmax(-1)
        if not first["top_k"] and first["top_p"] == 1 and not first["min_p"]:
            return draw_softmax(scores, *self._of(np.stack([rows["temperature"], uniform])).unbind())
        chances = probabilities_of(
            scores.float(),
            temperature=self._of(rows["temperature"]),
            top_k=self._of(rows["top_k"]) if first["top_k"] else None,
            top_p=self._of(rows["top_p"]) if first["top_p"] < 1 else None,
            min_p=self._of(rows["min_p"]) if first["min_p"] else None,
            widest=int(rows["top_k"].max()),
        )
        return draw(chances, self._of(uniform))

    def _rescored(self, logits: Tensor, asked: Asked) -> Tensor:
        """The scores after bias, penalties, bans, grammars and rules. The logits stay as they are."""
        slots, counts, rows = asked.slots, asked.counts, asked.rows
        scores = logits.to(torch.float32, copy=True)
        self._add_bias(scores, slots, np.flatnonzero(rows["biased"]))
        charged = np.flatnonzero(rows["penalized"])
        if charged.size:
            longest = int((rows["prompt"] + counts)[charged].max())
            self._penalties.apply(scores, self._of(charged), slots[charged], longest, rows["charges"][charged])
        self._ban_ends(scores, slots, np.flatnonzero(counts < rows["least"]))
        self._mask(scores, slots, np.flatnonzero(rows["grammar"]))
        self._rule(scores, slots, np.flatnonzero(rows["rule"]))
        return scores

    def _add_bias(self, scores: Tensor, slots: np.ndarray, own: np.ndarray) -> None:
        if own.size:
            tokens, added = zip(*(self._biases[slot] for slot in slots[own]), strict=True)
            places = np.repeat(own, [len(each) for each in tokens])
            scores[self._of(places), self._of(np.concatenate(tokens))] += self._of(np.concatenate(added))

    def _ban_ends(self, scores: Tensor, slots: np.ndarray, own: np.ndarray) -> None:
        ends = [np.fromiter(self._sequence(slot).stop, np.int64) for slot in slots[own]]
        if ends:
            places = np.repeat(own, [len(each) for each in ends])
            never = scores.new_full((), -torch.inf)
            scores.index_put_((self._of(places), self._of(np.concatenate(ends))), never)

    def _mask(self, scores: Tensor, slots: np.ndarray, own: np.ndarray) -> None:
        if own.size:
            words = self._of(masks([self._sequence(slot).matcher for slot in slots[own]]))
            bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=self._device)
            forbidden = (bits & 1 == 0).flatten(1)[:, : scores.shape[-1]]
            index = self._of(own)
            scores[index] = scores[index].masked_fill(forbidden, -torch.inf)

    def _rule(self, scores: Tensor, slots: np.ndarray, own: np.ndarray) -> None:
        for place in own:
            sequence = self._sequence(slots[place])
            rule = sequence.sampling.rule
            if rule is not None and rule.follows:
                scores[place] = rule.rescore(scores[place], sequence.tokens)
            elif rule is not None and sequence.companion is not None:
                scores[place] = rule.contrast(scores[place], scores[_place(slots, sequence.companion)])

    def _sequence(self, slot: int) -> Sequence:
        sequence = self._sequences[slot]
        assert sequence is not None
        return sequence

    def _of(self, values: np.ndarray) -> Tensor:
        return upload(values, self._device)


def _place(slots: np.ndarray, sequence: Sequence | None) -> int:
    """Where among ``slots`` a sequence stands that is in the same batch."""
    assert sequence is not None
    return int(np.flatnonzero(slots == sequence.slot)[0])


def _set_options(row: np.void, sampling: Sampling) -> None:
    row["temperature"], row["top_k"] = sampling.temperature, sampling.top_k or 0
    row["top_p"], row["min_p"] = sampling.top_p, sampling.min_p
