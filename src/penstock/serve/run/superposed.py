"""A model that drafts several texts in one row: what it is given is their last tokens, superposed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from penstock.core.devices import upload
from penstock.models.prompted import PromptedDecoder
from penstock.models.superposed import superposed
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Drawn, Sampled, Sampler
from penstock.serve.engine.batch import Batch, Entry
from penstock.serve.engine.drafted import Drafted, GoesOn
from penstock.serve.run.chains import Chains
from penstock.serve.run.draft import DraftModel
from penstock.serve.run.planner import Fields
from penstock.serve.run.runner import Runner
from penstock.serve.run.step import Superposed
from penstock.serve.run.trees import Growing
from penstock.speculate.contract import Superposing
from penstock.speculate.tree import Tree, path, pruned
from penstock.speculate.verifiers.contract import Verifier


class SuperposedSampler(Sampler):
    """Tells the likeliest tokens behind each of several drafts that were computed in one row, after bias, penalties,
    grammars and rules, and does not go on by any of them.

    Args:
        slots, vocabulary, device: as of :class:`Sampler`.
        drafts: how many tokens are told.

    Attributes:
        likeliest: int64 [R, k], of the rows that were asked for last.
        chances: float32 [R, k], the model's probability of each.
    """

    likeliest: Tensor
    chances: Tensor

    def __init__(self, slots: int, vocabulary: int, device: torch.device, drafts: int) -> None:
        super().__init__(slots, vocabulary, device)
        self._count = min(drafts, vocabulary)

    def sample(
        self, logits: Tensor, asked: Asked, drawn: Drawn | None = None, proposals: Proposals | None = None
    ) -> tuple[Sampled, Tensor]:
        """As of :class:`Sampler`, for ``logits`` [S, V]: all rows of a sequence have the same."""
        logits = logits[self._of(asked.owners)]
        scores = self._rescored(logits, asked) if asked.rows["rescored"].any() else logits
        self.chances, self.likeliest = scores.float().softmax(-1).topk(self._count, -1)
        tokens = self.likeliest[:, 0]
        return Sampled(tokens), tokens[self._of(asked.first)]


class Superposition(Growing):
    """The drafts of one sequence, as the tree that they are.

    Args:
        entry: brings the sequence's newest token.
        wanted: how far its text is to go, in tokens that have to be computed here.
        most: how many drafts there are at most.
    """

    def __init__(self, entry: Entry, wanted: int, most: int) -> None:
        super().__init__(entry, wanted)
        assert isinstance(entry.sequence.draft, Superposing)
        self._draft, self._most, self._depth = entry.sequence.draft, most, 0
        #: Of the last token of each draft that goes on, the log of the draft's probability.
        self._logs = {-1: 0.0}
        self._ended: list[int] = []

    def cross(self, likeliest: list[list[int]], chances: list[list[float]]) -> None:
        """Of each draft that goes on, in order, the tokens that are ``likeliest`` behind it, with their ``chances``:
        of all that they make of the drafts, the best stay."""
        ways = {node: [self.tokens[each] for each in path(self.parents, node)] for node in self._last}
        logs: dict[tuple[int, int], float] = {}
        for node, tokens, shares in zip(self._last, likeliest, chances, strict=True):
            count = len(shares) - shares.count(0.0)  # what must not come has none, and is told last
            mixed = self._draft.chances(ways[node], tokens[:count], shares[:count])
            for token, chance in zip(tokens, mixed, strict=False):
                if chance > 0:
                    logs[token, node] = self._logs[node] + math.log(chance)
        best = sorted(logs, key=lambda each: -logs[each])[: self._most]
        going = [(token, node) for token, node in best if self._allows(ways[node], token)]
        ended = [each for each in best if each not in going]
        first, middle = len(self.tokens), len(self.tokens) + len(ended)
        self._add(ended, going)
        self._depth += 1
        self._ended += range(first, middle)
        self._logs = {middle + number: logs[each] for number, each in enumerate(going)}

    @property
    def width(self) -> int:
        """How many drafts go on."""
        return len(self._last)

    @property
    def superposed(self) -> tuple[np.ndarray, np.ndarray]:
        """The last tokens of the drafts that go on, and the weight of each: its draft's share of their
        probabilities."""
        best = max(self._logs.values())
        shares = [math.exp(log - best) for log in self._logs.values()]
        return np.array([self.tokens[node] for node in self._logs]), np.array(shares) / sum(shares)

    def row(self) -> Entry:
        """The one in which the drafts that go on are computed, behind those of the text and the ones before. It is no
        token of the text: the model knows it as -1 - slot."""
        place = self._start + self._depth - 1
        return Entry(self._sequence, self._slot, place, 1, 1, window=(-1 - self._slot,))

    @property
    def tree(self) -> Tree:
        """The drafts that stayed, and those that have ended the text."""
        kept = {node for end in (*self._ended, *self._logs) for node in path(self.parents, end)}
        return pruned(Tree(self.tokens, self.parents), kept)


class SuperposedModel(DraftModel):
    """Drafts several texts of each sequence with a model, in one row a pass.

    Args:
        runner: of a :class:`PromptedDecoder` with a vector for each slot, with a :class:`SuperposedSampler` and a
            :class:`~penstock.serve.run.draft.DraftPlanner`.
        verifier: of the drafts; one that matches, since they are drawn from nothing.
        tokens: most that are computed in a pass.
        drafts: of each sequence.
    """

    def __init__(self, runner: Runner, verifier: Verifier, tokens: int, drafts: int) -> None:
        super().__init__(runner, verifier, Chains(), tokens)
        self._drafts = drafts

    def draft(self, batch: Batch, goes_on: GoesOn | None = None) -> Drafted:
        wanted = self._awaited(batch)
        first = self._first(batch, wanted)
        grown = {each.slot: Superposition(each, wanted[each.slot], self._drafts) for each in first if each.scored}
        if first:
            scored, _ = self._pass(first, batch.tables)
            going = [grown[entry.slot] for entry in scored]
            while going:
                self._cross(going)
                going = [each for each in going if each.goes_on]
                if going:
                    self._pass_superposed(going, batch.tables)
        drafted = Drafted()
        for slot, each in grown.items():
            tree = each.tree
            drafted.windows[slot] = tree.tokens
            if tree.branched:
                drafted.parents[slot] = tree.parents
        return drafted

    def _cross(self, going: list[Superposition]) -> None:
        """What the last pass found goes to those that it was for, in order."""
        sampler, row = self.sampler, 0
        assert isinstance(sampler, SuperposedSampler)
        likeliest, chances = sampler.likeliest.tolist(), sampler.chances.tolist()
        for each in going:
            last = row + each.width
            each.cross(likeliest[row:last], chances[row:last])
            row = last

    @torch.inference_mode()
    def _pass_superposed(self, going: list[Superposition], tables: np.ndarray) -> None:
        """Queues the pass of one row for each of ``going``, which its drafts make together."""
        model, planner = self.runner.model, self.runner.planner
        assert isinstance(model, PromptedDecoder)
        rows, generations = [each.row() for each in going], [each.generation() for each in going]
        slots = np.array([entry.slot for entry in rows])
        known = Superposed.of(slots, [each.superposed for each in going])
        model.prompts[self._of(slots)] = superposed(model.embedded, self._of(known.tokens), self._of(known.weights))
        step = planner.plan(Batch(rows, tables))
        # What is asked is asked behind each draft.
        _, asked = planner.ask(generations, Fields.of(generations))
        self.runner.execute(dataclasses.replace(step, asked=asked))

    def _of(self, values: np.ndarray) -> Tensor:
        return upload(values, self._device)
