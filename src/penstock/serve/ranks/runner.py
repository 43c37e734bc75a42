"""Runners that compute steps together with those of the other ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.core.errors import UsageError
from penstock.core.progress import Reporter, silent
from penstock.models.paged import PagedTokens
from penstock.models.superposed import superposing
from penstock.ops.paged.contract import StepShape
from penstock.serve.choose.asked import Asked
from penstock.serve.choose.proposals import Proposals
from penstock.serve.choose.sampler import Sampled
from penstock.serve.engine.batch import Batch
from penstock.serve.ranks.group import Ranks
from penstock.serve.ranks.runs import runs_of
from penstock.serve.ranks.stages import StageDecoder
from penstock.serve.run.copies import shaken
from penstock.serve.run.record import encoded
from penstock.serve.run.runner import Passed, Runner
from penstock.serve.run.step import Part, Step

#: What those can do who want what is not there.
ALONE = "Leave out tensor_parallel and pipeline_parallel."


class RankRunner(Runner):
    """A runner of a rank's share of a model.

    All ranks compute the same step from the same data, and have the same bits after each exchange: each draws the next
    tokens by itself, and they are the same.
    """

    def load(self, weights: Mapping[str, Tensor] | Path) -> None:
        raise UsageError("a model that is divided among ranks has the same weights all the time", hint=ALONE)

    def sleep(self) -> None:
        raise UsageError("a model that is divided among ranks cannot sleep", hint=ALONE)

    def states(self, texts: List[List[int]]) -> list[Tensor]:
        raise UsageError("a model that is divided among ranks gives no hidden states", hint=ALONE)

    def _pass_all(self, parts: List[Part], lead: int) -> list[Passed]:
        # One after the other: all ranks have to make their exchanges in one order.
        return [self._pass(part) for part in parts]


@dataclasses.dataclass(frozen=True)
class SampledTogether(Sampled):
    """What was chosen, which is worth nothing where a rank was lost meanwhile.

    Attributes:
        ranks: the others.
    """

    ranks: Ranks | None = None

    @classmethod
    def by(cls, ranks: Ranks, sampled: Sampled) -> SampledTogether:
        """What was ``sampled`` with the help of ``ranks``."""
        known = {field.name: getattr(sampled, field.name) for field in dataclasses.fields(sampled)}
        return cls(**known, ranks=ranks)

    def wait(self) -> Sampled:
        assert self.ranks is not None
        with self.ranks.together():
            super().wait()
            self.ranks.require()
        return self


class LeadingRunner(RankRunner):
    """That of the first rank: what it does, it tells the others to do.

    Args:
        ranks: the others, which have loaded their shares.
        arguments, options: those of :class:`~penstock.serve.run.runner.Runner`.
    """

    ranks: Ranks | None = None

    def __init__(self, *arguments: Any, ranks: Ranks, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ranks = ranks
        ranks.tell("open", self.blocks)

    @contextlib.contextmanager
    def _led(self, what: str, *arguments: Any) -> Iterator[None]:
        """Within the block this rank does what it tells the others to do."""
        if self.ranks is None:  # there is nobody yet who could
            yield
            return
        with self.ranks.together():
            self.ranks.tell(what, *arguments)
            yield

    def forget(self) -> None:
        with self._led("forget"):
            super().forget()

    def resize(self, blocks: int) -> None:
        with self._led("resize", blocks):
            super().resize(blocks)

    def compile_pass(self) -> None:
        with self._led("compile_pass"):
            super().compile_pass()

    def timed(self, shape: StepShape) -> tuple[float, float]:
        with self._led("timed", list(shape)):
            return super().timed(shape)

    def choose(self, *shapes: List[StepShape]) -> None:
        with self._led("choose", *([list(shape) for shape in own] for own in shapes)):
            super().choose(*shapes)

    def try_graphs(self, free: Callable[[], int]) -> int:
        with self._led("try_graphs"):
            return super().try_graphs(free)

    def capture(self, report: Reporter = silent) -> None:
        with self._led("capture"):
            super().capture(report)

    def load_adapter(self, slot: int, folder: Path) -> bytes:
        assert self.ranks is not None
        # Where it does not fit, that is said here, and nothing has changed anywhere.
        key = super().load_adapter(slot, folder)
        self.ranks.load_adapter(slot, folder, key)
        return key

    def execute(self, step: Step, proposals: Proposals | None = None) -> Sampled | None:
        assert self.ranks is not None
        with self._led("execute", encoded(step)):
            sampled = super().execute(step, proposals)
        return None if sampled is None else SampledTogether.by(self.ranks, sampled)

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.ranks is not None:
                self.ranks.close()


class Later:
    """What will come out of a ``step`` whose last stage is computed when it is waited for."""

    def __init__(self, runner: LastStageRunner, step: Step) -> None:
        self._runner, self.step = runner, step
        self.sampled: Sampled | None = None

    def wait(self) -> Sampled | None:
        self._runner.reach(self)
        return self.sampled


class LastStageRunner(LeadingRunner):
    """That of the first rank of a pipeline, which has the last stage.

    The other stages begin with a step as soon as they are told; this one computes its own part when somebody waits for
    what comes out. So several steps are under way at a time, each in another stage. Where a step has drafted tokens,
    its runs follow each other in the same way; those that are behind a token that was not what was drafted are given
    up, and stages that have not begun with them skip them.

    Args:
        arguments, options: those of :class:`LeadingRunner`.
        tokens_of_run: how many drafted tokens of a sequence a run has; None where there is one run.
    """

    model: StageDecoder

    def __init__(self, *arguments: Any, tokens_of_run: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._later: deque[Later] = deque()
        self._tokens_of_run, self._number = tokens_of_run, 0
        self._step: Step | None = None
        #: Tokens of the runs that were given up, and will be heard of all the same.
        self._given_up: list[int] = []

    def launch(self, batch: Batch) -> Later:
        assert self.ranks is not None
        step = self.plan(batch)
        with self.ranks.together():
            self.ranks.tell("execute", encoded(step))
        self._later.append(Later(self, step))
        return self._later[-1]

    def reach(self, later: Later) -> None:
        """Computes the steps up to that of ``later``, in order, as far as they have not been computed yet."""
        assert self.ranks is not None
        with self.ranks.together():
            while later in self._later:
                each = self._later.popleft()
                self._step, self._number = each.step, self._number + 1
                each.sampled = Runner.execute(self, each.step)
            if later.sampled is not None:
                later.sampled.wait()
            self.ranks.require()

    def close(self) -> None:
        if self.ranks is not None and not self.ranks.lost:
            with self.ranks.together():
                self._forget_given_up()
        super().close()

    def _forget_given_up(self) -> None:
        for tokens in self._given_up:
            self.model.arrives(tokens)
            self.model.announce(False)
        self._given_up.clear()

    def _pass_all(self, parts: List[Part], lead: int) -> list[Passed]:
        assert self.ranks is not None and self._step is not None
        self._forget_given_up()
        step = self._step
        first, *speculative = runs_of(step, self._tokens_of_run, self.ranks.share.size - 1)
        if not speculative or len(parts) > 1:
            return super()._pass_all(parts, lead)
        passed, scored = self._pass(first), parts[0].scored
        assert passed.logits is not None
        logits = passed.logits.new_zeros(len(scored), passed.logits.shape[-1])
        rows = _rows_of(step, [first, *speculative])
        logits[rows[0]] = passed.logits
        for number, run in enumerate(speculative, 1):
            if not self._goes_on(step.asked, logits, rows[number - 1], rows[number:]):
                self.ranks.tell("skip", self._number)
                self._given_up = [each.inputs.shape[1] for each in speculative[number - 1 :]]
                break
            self.model.arrives(run.inputs.shape[1])
            found = self._pass(run).logits
            assert found is not None
            logits[rows[number]] = found
        return [dataclasses.replace(passed, logits=logits)]

    def _goes_on(self, asked: Asked, logits: Tensor, known: np.ndarray, later: List[np.ndarray]) -> bool:
        """Whether any of the rows of ``later`` runs may still be reached, once those that are ``known`` are computed.
        Windows of sequences that end there are cut off, so that nobody reads what is not computed."""
        assert asked.window is not None
        tokens = self.sampler.foretold(logits[known], asked, known).tolist()
        for row, token in zip(known.tolist(), tokens, strict=True):
            own, place = asked.owners[row], row - asked.first[asked.owners[row]]
            if place < asked.window.shape[1] and not asked.rows["rescored"][row] and asked.window[own, place] != token:
                asked.window[own, place:] = -1
        ahead = np.concatenate(later)
        places = ahead - asked.first[asked.owners[ahead]] - 1
        return bool((asked.window[asked.owners[ahead], places] >= 0).any())


def _rows_of(step: Step, runs: List[Part]) -> list[np.ndarray]:
    """Which of the scored rows of ``step`` each of its ``runs`` has."""
    slots = step.parts[0].plan.slots.numpy()[step.parts[0].scored]
    return [np.flatnonzero(np.isin(slots, run.plan.slots.numpy()[run.scored])) for run in runs]


class StageRunner(RankRunner):
    """That of any other rank of a pipeline: what it computes goes to the next one, and nothing is drawn.

    Args:
        arguments, options: those of :class:`~penstock.serve.run.runner.Runner`.
        stages: how many there are.
        tokens_of_run: as of :class:`LastStageRunner`.

    Attributes:
        skipped: whether what is speculative of a step, by its number from 1, is to be skipped.
    """

    model: StageDecoder

    def __init__(self, *arguments: Any, stages: int, tokens_of_run: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stages, self._tokens_of_run, self._number = stages, tokens_of_run, 0
        self.skipped: Callable[[int], bool] = lambda number: False

    @torch.inference_mode()
    def execute(self, step: Step, proposals: Proposals | None = None) -> None:
        self._number += 1
        if step.copies.size:
            self.cache.copy(*step.copies.tolist())
        runs = runs_of(step, self._tokens_of_run, self._stages - 1)
        if len(step.parts) > 1:
            for part in step.parts:
                self._hand_on(part)
            return
        for number, run in enumerate(runs):
            if number:
                computed = self.model.arrives(run.inputs.shape[1]) and not self.skipped(self._number)
                self.model.announce(computed)
                if not computed:
                    continue
            self._hand_on(run)

    def _hand_on(self, part: Part) -> None:
        """Computes ``part``, and what is copied of it, and sends it on."""
        inputs, plan, own = part.inputs, part.plan, part.inputs.shape[1]
        with contextlib.ExitStack() as shaking:
            if part.copied is not None:
                inputs, plan = part.copied.beside(inputs, plan, self.blocks, self.block_size)
                noise = part.copied.noise(self.shape, inputs[2, own:])
                shaking.enter_context(shaken(self.model, self._on_device(noise)))
            shaking.enter_context(superposing(self.model, self._superposed(part)))
            self.cache.plan(plan)
            tokens, _, positions = self._on_device(inputs)
            self.model.hand_on(tokens, PagedTokens(positions, self.cache))
