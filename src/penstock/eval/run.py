"""Asking a model the questions of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from penstock.core.errors import PenstockError, UsageError
from penstock.core.progress import Reporter, show
from penstock.core.signals import StopRequest
from penstock.eval.contract import Outcome, Sample, Task
from penstock.eval.statistics import Estimate, estimate
from penstock.policy import create
from penstock.serve.offline.gather import RequestOutput
from penstock.serve.offline.llm import LLM

#: A task: a policy, its name, or a table with ``name`` and options.
TaskLike = Task | str | Mapping[str, Any]

#: Answers that are judged at a time, beside the engine.
JUDGES = 2


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a task.

    Attributes:
        estimate: the figure, with its interval.
        failed: answers that could not be judged, or written, which count as wrong.
        reason: why the first of them could not.
        outcomes: of the samples, in their order.
    """

    task: str
    metric: str
    better: str
    estimate: Estimate
    failed: int
    reason: str
    outcomes: Sequence[Outcome]

    @classmethod
    def of(cls, task: Task, outcomes: Sequence[Outcome]) -> Result:
        """The result of these ``outcomes`` of ``task``."""
        figure = estimate([each.value for each in outcomes], [each.weight for each in outcomes])
        failed = [each.error for each in outcomes if each.error is not None]
        return cls(task.policy_name, task.metric, task.better, figure, len(failed), (failed or [""])[0], outcomes)

    def record(self) -> dict[str, Any]:
        """As plain data, without the outcomes."""
        found = {key: value for key, value in vars(self).items() if key not in ("outcomes", "estimate")}
        return {**found, **dataclasses.asdict(self.estimate), "samples": len(self.outcomes)}


def evaluate(
    llm: LLM, tasks: TaskLike | Sequence[TaskLike], *, chat: bool = False, progress: Reporter = show
) -> list[Result]:
    """Asks ``llm`` all questions of ``tasks``, in one continuous batch::

        for result in evaluate(LLM("python-6m"), ["code", {"name": "arithmetic", "digits": 1}]):
            print(result.task, result.estimate)

    Args:
        tasks: one or several.
        chat: ask by the model's chat template.
        progress: how to report; ``core.progress.silent`` is quiet.

    Raises:
        UsageError: a question does not fit the model's context. Nothing is asked then.
        KeyboardInterrupt: after Ctrl-C.
    """
    each = [tasks] if isinstance(tasks, Task | str | Mapping) else tasks
    evaluation = Evaluation([task_of(task) for task in each], chat)
    outcomes: dict[int, Outcome] = {}
    with StopRequest() as stop, progress("evaluating", len(evaluation), "sample") as bar:
        for place, outcome in evaluation.asked(llm, (), stop):
            outcomes[place] = outcome
            bar.advance()
    if stop.wanted:
        raise KeyboardInterrupt
    return evaluation.results(outcomes)


def task_of(task: TaskLike) -> Task:
    """The task that is named or described so.

    Raises:
        UsageError: there is none of that name, or an option is wrong.
    """
    if isinstance(task, Task):
        return task
    options = {"name": task} if isinstance(task, str) else dict(task)
    return cast(Task, create("eval.task", options.pop("name"), **options))


class Evaluation:
    """The samples of several tasks, one task's behind the other's.

    Attributes:
        samples: with the task that each belongs to; their places are what the methods count by.
    """

    def __init__(self, tasks: Sequence[Task], chat: bool = False) -> None:
        self.tasks, self._chat = list(tasks), chat
        self.drawn: list[list[Sample]] = [task.draw() for task in self.tasks]
        self.samples = [(task, sample) for task, drawn in zip(self.tasks, self.drawn, strict=True) for sample in drawn]

    def __len__(self) -> int:
        return len(self.samples)

    def asked(self, llm: LLM, done: Collection[int], stop: StopRequest) -> Iterator[tuple[int, Outcome]]:
        """Asks all samples but those that are ``done``; gives each one's place and outcome as soon as it is there, and
        ends early once ``stop`` is wanted. Answers are judged beside the engine.

        Raises:
            UsageError: a question does not fit the model's context. Nothing is asked then.
            PenstockError: the engine failed on one.
        """
        places = [place for place in range(len(self)) if place not in done]
        prompts, params = [], []
        for place in places:
            task, sample = self.samples[place]
            prompt, sampling = task.ask(sample, llm.tokenizer, chat=self._chat)
            self._fits(task, len(prompt) + sampling.max_tokens, llm.engine.limits.context)
            prompts.append(prompt)
            params.append(sampling)
        judges, judged = ThreadPoolExecutor(JUDGES, "judge"), dict[Future[Outcome], int]()
        try:
            for at, output in llm.as_completed(prompts, params, stop):
                judged[judges.submit(self._outcome, places[at], output)] = places[at]
                yield from _taken(judged, [each for each in judged if each.done()])
            while judged and not stop.wanted:
                yield from _taken(judged, [next(iter(judged))])
        finally:
            judges.shutdown(wait=False, cancel_futures=True)

    def _fits(self, task: Task, tokens: int, context: int) -> None:
        if tokens > context:
            name = task.policy_name
            raise UsageError(
                f"a question of {name} takes {tokens:,} tokens with its answer, and the model reads {context:,}",
                hint=f"Leave the task out, or make its questions shorter; penstock eval --list shows {name}'s options.",
            )

    def _outcome(self, place: int, output: RequestOutput) -> Outcome:
        task, sample = self.samples[place]
        if output.error is not None:  # nobody knows what the model would have said
            raise PenstockError(f"the engine failed on a question of {task.policy_name}: {output.error}")
        return task.outcome(sample, output)

    def results(self, outcomes: Mapping[int, Outcome]) -> list[Result]:
        """The results of the tasks all of whose samples have an outcome."""
        found, start = [], 0
        for task, drawn in zip(self.tasks, self.drawn, strict=True):
            places = range(start, start + len(drawn))
            start += len(drawn)
            if all(place in outcomes for place in places):
                found.append(Result.of(task, [outcomes[place] for place in places]))
        return found


def _taken(judged: dict[Future[Outcome], int], ready: Sequence[Future[Outcome]]) -> Iterator[tuple[int, Outcome]]:
    """Takes those that are ``ready``, or will be, out of what is ``judged``."""
    for future in ready:
        yield judged.pop(future), future.result()
