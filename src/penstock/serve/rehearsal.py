"""Requests that an engine answers before it serves: to see what the largest steps take, and so that nobody waits for
what happens at the first use. An engine that rehearsed is of no further use; its runner is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as List

import torch

from penstock.ops.linear import FEW
from penstock.serve.choose.sampling import MOST_LOGPROBS, SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine.drafted import DraftExecutor
from penstock.serve.engine.engine import Engine
from penstock.serve.engine.executor import Executor
from penstock.serve.engine.prompt_clock import PromptClock
from penstock.serve.messages import Request
from penstock.speculate.contract import Drafter
from penstock.speculate.controllers.contract import Control, Controller, Seen
from penstock.speculate.controllers.fixed import Fixed
from penstock.speculate.tree import Tree, full

#: Tokens of the prompts of those that go on beside the longest prompt, and how many steps they go on.
SHORT, STEPS = 2, 8

#: Steps of each kind that are timed, and seconds after which no more are.
TIMED, ENOUGH = 3, 1.0


def rehearse_first_uses(config: EngineConfig, executor: Executor, draft: DraftExecutor | None = None) -> None:
    """Answers a long prompt, then some short ones at a time: what is compiled or loaded on first use, such as how one
    token is drawn and how several are, and products of each small number of rows, is there before anybody waits for
    it. Where ``config`` drafts, the same again with as many drafts as there can be, whatever the controller would ask
    for by then: one that goes by time would take what happens at the first use for what a draft costs."""
    _answer_few(Engine(config, executor, draft=draft), 2)
    if config.draft is not None:
        # A model that drafts computes the longest prompt and the token behind it in one pass, if that has room for it.
        _answer_few(_engine(config, executor, draft), 2 + config.draft.most, behind=1)


def _answer_few(engine: Engine, tokens: int, behind: int = 0) -> None:
    """Answers of up to so many ``tokens``, for which the longest prompt, too, leaves room in the context, and room for
    so many ``behind`` it in a step."""
    limits = engine.limits
    longest, short = (max(1, min(most, limits.context - tokens)) for most in (limits.tokens - behind, SHORT))
    for lengths in ([longest], *([short] + [1] * more for more in range(FEW))):
        for place, length in enumerate(lengths):
            wanted = min(tokens, limits.context - length)
            engine.add(Request(str(place), [0] * length, SamplingParams(temperature=1, max_tokens=wanted)))
        while engine.busy:
            engine.step()


def rehearse_prompts(config: EngineConfig, executor: Executor) -> PromptClock:
    """What a token of a long prompt takes, by the second of two that fill the budget of a step: the first also takes
    what happens at the first use."""
    engine = _engine(config, executor, None)
    longest = min(engine.limits.tokens, engine.limits.context - 1)
    for first in range(2):
        engine.steps.prompts = PromptClock()
        prompt = [(first + place) % executor.shape.vocabulary for place in range(longest)]
        engine.add(Request(str(first), prompt, SamplingParams(temperature=0, max_tokens=1)))
        while engine.busy:
            engine.step()
    return engine.steps.prompts


def rehearsal_blocks(config: EngineConfig, device: torch.device, context: int) -> int:
    """The blocks that :func:`rehearse_largest_steps` needs, for sequences of ``context`` tokens at most."""
    longest = min(config.budget(device), context - 1)
    each = -(-min(SHORT + STEPS * config.rows, context) // config.block_size)
    # Nobody is admitted where less than a block for each that runs stays in hand.
    return config.sequences * (each + 1) + -(-(longest + SHORT) // config.block_size)


class Zeros(Drafter):
    """Drafts as much as there may be of a text of zeros, whatever the text is.

    Attributes:
        tokens: most that are drafted at a time.
    """

    tokens: int

    @property
    def most(self) -> int:
        return self.tokens

    def start(self, tokens: List[int]) -> Zeros:
        return self

    def extend(self, tokens: List[int]) -> None:
        pass

    def propose(self, most: int) -> list[int]:
        return [0] * min(most, self.tokens)

    def grow(self, branches: List[int], depth: int, most: int) -> Tree:
        parents = full(branches, min(depth, self.tokens), most)
        return Tree([0] * len(parents), parents)


class Timing(Control):
    """Has ``length`` tokens drafted in each step.

    Attributes:
        length: how many.
        seen: the steps of which it is known what they took, without those that compute prompts.
    """

    def __init__(self) -> None:
        self.length, self.seen = 0, list[Seen]()

    def ahead(self, sequences: int) -> int:
        return self.length

    def learn(self, seen: Seen) -> None:
        if seen.seconds is not None and not seen.prompts and seen.ahead == self.length:
            self.seen.append(seen)


class Timed(Controller):
    """Leaves it to a control that others have, too.

    Attributes:
        control: decides.
    """

    control: Timing

    def start(self, most: int) -> Control:
        return self.control


def rehearse_drafts(config: EngineConfig, engine: Engine) -> None:
    """Tells what decides in ``engine`` how many tokens are drafted, before there are any requests, what steps take by
    how many are: for one sequence, two, four and so on, as long as that does not take long, with the drafting of its
    model, if it has one. What is accepted shows with the first drafts; what they cost it would have to find out by
    losing. Nothing is told where all that is computed is recorded, nor where stages would wait for each other."""
    speculation = engine.steps.speculation
    apart = config.record is None and config.pipeline_parallel == 1
    if speculation is None or not speculation.asks() or not apart:
        return
    control, draft = Timing(), speculation.model
    config = config.model_copy(update={"controller": Timed(control=control)})
    if draft is None and config.draft is not None:
        config = config.model_copy(update={"draft": Zeros(tokens=config.draft.most)})
    other, begun = Engine(config, engine.executor, draft=draft), time.perf_counter()
    crowds = itertools.takewhile(lambda size: size <= other.limits.sequences, (2**power for power in range(31)))
    for crowd, length in itertools.product(crowds, speculation.asks()):
        control.length = length
        # The least: the first step of its kind computes what was missed before, and more may happen for the first time.
        if took := [seen.seconds for seen in _timed(other, control, crowd) if seen.seconds is not None]:
            speculation.expect(crowd, length, min(took))
        if time.perf_counter() - begun > ENOUGH:
            break


def _timed(engine: Engine, control: Timing, crowd: int) -> list[Seen]:
    """Some steps in which so many sequences go on."""
    control.seen.clear()
    rows = 1 + control.length
    wanted = min(rows * (STEPS + TIMED), engine.limits.context - SHORT)
    sampling = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True)
    for place in range(crowd):
        engine.add(Request(str(place), [place % engine.executor.shape.vocabulary] * SHORT, sampling))
    while engine.busy and len(control.seen) <= TIMED:
        engine.step()
    for place in range(crowd):
        engine.abort(str(place))
    while engine.busy:
        engine.step()
    return [seen for seen in control.seen if seen.sequences == crowd]


def rehearse_largest_steps(config: EngineConfig, executor: Executor, draft: DraftExecutor | None = None) -> None:
    """Answers as many requests at a time as there can be, all of which ask for what takes the most memory, and beside
    them a prompt that fills the budget of a step. Where ``config`` drafts, as many tokens are drafted as can be, by the
    model ``draft`` if it is given."""
    engine = _engine(config, executor, draft)
    prompt = [0] * min(SHORT, engine.limits.context - 1)
    # The bias makes a text of zeros, so that what is drafted is accepted.
    often = {"temperature": 1, "top_p": 0.9, "presence_penalty": 0.01, "logit_bias": {0: 100.0}, "ignore_eos": True}
    short = SamplingParams.model_validate(
        {
            **often,
            "max_tokens": min(STEPS * config.rows, engine.limits.context - len(prompt)),
            "logprobs": MOST_LOGPROBS,
        }
    )
    for place in range(engine.limits.sequences - 1):
        engine.add(Request(str(place), prompt, short))
    for _ in range(2):
        engine.step()
    longest = min(engine.limits.tokens, engine.limits.context - 1)
    long = SamplingParams.model_validate(
        {**often, "max_tokens": 1, "logprobs": MOST_LOGPROBS, "prompt_logprobs": MOST_LOGPROBS}
    )
    engine.add(Request("longest", [0] * longest, long))
    while engine.busy:
        engine.step()


def _engine(config: EngineConfig, executor: Executor, draft: DraftExecutor | None) -> Engine:
    """One that drafts by ``draft``, or zeros where ``config`` drafts and that is not given."""
    drafter = config.draft if draft or not config.draft else Zeros(tokens=config.draft.most)
    return Engine(config.model_copy(update={"draft": drafter, "controller": Fixed()}), executor, draft=draft)
