"""A folder with an evaluation: resumed where it was stopped or killed, read again, compared with another."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.core.errors import PenstockError, UsageError
from penstock.core.files import claim, read_json, write_json
from penstock.eval.contract import Outcome, fingerprint
from penstock.eval.run import Evaluation, Result, task_of
from penstock.eval.statistics import Difference, difference
from penstock.models import hub
from penstock.search.runs import Results

#: The file with the settings is called KIND.json.
KIND = "evaluation"

#: Where results go if nothing is said.
EVALS = Path("evals")


def settings(model: str, evaluation: Evaluation, chat: bool) -> dict[str, Any]:
    """What decides the results: the model, the tasks with their options and samples, and how they are asked."""
    pairs = zip(evaluation.tasks, evaluation.drawn, strict=True)
    tasks = [{**task.describe(), "questions": fingerprint(drawn)} for task, drawn in pairs]
    return {"model": model, "chat": chat, "tasks": tasks}


def free_folder(model: str, wanted: Mapping[str, Any], samples: int) -> Path:
    """Where an evaluation of ``model`` goes if nothing is said: ``evals/NAME``, or the first with a number behind that
    is not there, or holds a part of the one ``wanted``, of so many ``samples``, and can go on."""
    return next(each for each in _default_folders(model) if not each.exists() or _goes_on(each, wanted, samples))


def results_of(source: str) -> Path:
    """The folder of an evaluation: ``source`` itself, or the newest of the model's that :func:`free_folder` has
    named."""
    if (Path(source) / f"{KIND}.json").is_file():
        return Path(source)
    there = list(itertools.takewhile(Path.exists, _default_folders(source)))
    found = [each for each in there if (each / f"{KIND}.json").is_file()]
    return found[-1] if found else Path(source)


def _default_folders(model: str) -> Iterator[Path]:
    name = hub.name_of(model).rpartition("/")[2]
    yield EVALS / name
    yield from (EVALS / f"{name}-{number}" for number in itertools.count(2))


def _goes_on(folder: Path, wanted: Mapping[str, Any], samples: int) -> bool:
    """Whether a folder holds a part of the evaluation that is wanted."""
    try:
        same = read_json(folder / f"{KIND}.json") == json.loads(json.dumps(wanted))
        return same and len((folder / "results.jsonl").read_bytes().splitlines()) < samples
    except (OSError, PenstockError):
        return False


class Record:
    """The outcomes in a folder, a line of ``results.jsonl`` each, which is durable once it is written.

    Args:
        folder: made if it is not there.
        model: what is evaluated.
        evaluation: the samples.
        chat: whether they are asked by a chat template.

    Raises:
        UsageError: the folder holds another evaluation.
        PenstockError: it cannot be read or written.
    """

    def __init__(self, folder: Path, model: str, evaluation: Evaluation, chat: bool) -> None:
        self._folder, self._model, self._evaluation = folder, model, evaluation
        self._lines = Results(folder, settings(model, evaluation, chat), KIND)

    @property
    def outcomes(self) -> dict[int, Outcome]:
        """Those that are there, by the sample's place."""
        return _outcomes(self._lines.done.values())

    def write(self, place: int, outcome: Outcome) -> None:
        """Adds an outcome."""
        task, sample = self._evaluation.samples[place]
        asked = {"task": task.policy_name, "reference": sample.reference}
        self._lines.write(place, {**asked, **dataclasses.asdict(outcome)})

    def close(self) -> list[Result]:
        """Writes the results of the tasks that are done to ``summary.json``, and gives them."""
        self._lines.close()
        found = self._evaluation.results(self.outcomes)
        write_json(self._folder / "summary.json", {"model": self._model, "results": [each.record() for each in found]})
        return found


def _outcomes(lines: Any) -> dict[int, Outcome]:
    names = [field.name for field in dataclasses.fields(Outcome)]
    return {line["place"]: Outcome(**{name: line[name] for name in names}) for line in lines}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A task in two evaluations, with the ``difference`` of the second to the first."""

    task: str
    first: Result
    second: Result
    difference: Difference

    def record(self) -> dict[str, Any]:
        """As plain data."""
        apart = dataclasses.asdict(self.difference)
        return {"task": self.task, "first": self.first.record(), "second": self.second.record(), "difference": apart}


def compare(first: Path, second: Path) -> list[Comparison]:
    """Compares the evaluations in two folders, task by task, where both asked the same questions.

    Raises:
        UsageError: a folder holds no evaluation, or no task is finished in both with the same questions.
    """
    one, other = _read(first), _read(second)
    shared = [key for key in one if key in other]
    if not shared:
        raise UsageError(
            f"no task is finished in both {first} and {second} with the same questions: "
            f"{_named(one)} there, {_named(other)} here",
            hint="Evaluate both with the same --tasks, --samples, --seed and --option.",
        )
    return [_comparison(one[key], other[key]) for key in shared]


def _comparison(one: Result, other: Result) -> Comparison:
    values = [[outcome.value for outcome in result.outcomes] for result in (one, other)]
    apart = difference(values[0], values[1], [outcome.weight for outcome in one.outcomes])
    return Comparison(one.task, one, other, apart)


def _named(finished: Iterable[tuple[str, str]]) -> str:
    return ", ".join(name for name, _ in finished) or "none"


def _read(folder: Path) -> dict[tuple[str, str], Result]:
    """The finished tasks of a folder by name and questions."""
    described = folder / f"{KIND}.json"
    if not described.is_file():
        raise UsageError(
            f"{folder} holds no evaluation: there is no {described.name}",
            hint="Name the folders of two runs of penstock eval, or models that it has evaluated here.",
        )
    found, start = {}, 0
    with claim(folder):
        try:
            settings = read_json(described)
            tasks = [(dict(table), table["questions"]) for table in settings["tasks"]]
            lines = Results(folder, settings, KIND)
            lines.close()
            outcomes = _outcomes(lines.done.values())
        except (LookupError, TypeError, ValueError) as error:
            raise UsageError(f"{folder} holds no evaluation that can be read: {error!r}") from error
    for table, questions in tasks:
        del table["questions"]
        task = task_of(table)
        places = range(start, start + task.samples)
        start += task.samples
        if all(place in outcomes for place in places):
            found[task.policy_name, str(questions)] = Result.of(task, [outcomes[place] for place in places])
    return found
