"""The contract ``eval.task``: questions for a model, and what its answers are worth.

There are two kinds. For a :class:`Written` task the model writes an answer, which is right or wrong; of a
:class:`Predicted` one it is told the answer, and charged the bits that it needs for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from penstock.core.errors import ConfigError, UsageError
from penstock.core.randomness import derive, numpy_generator
from penstock.data.building import is_held_out
from penstock.policy import Policy, contract
from penstock.search.scorers.contract import Verdict
from penstock.serve.chat import chat_tokens
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.offline.gather import RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["held_out", "train"]

#: The share of all questions that can be made that is held out from the part to train on.
HELD_OUT = 0.2

#: Attempts after which there are no more questions than were found.
PATIENCE = 2000


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question.

    Attributes:
        prompt: what the model continues.
        reference: a right continuation.
        key: what decides whether it is held out: two questions of which one gives the other away have the same.
        problem: what else is needed to judge an answer.
    """

    prompt: str
    reference: str
    key: str
    problem: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a sample. A task's result is the sum of ``value`` over the sum of ``weight``.

    Attributes:
        value: 1 for a right answer and 0 for a wrong one; or bits.
        weight: 1; or the bytes that the bits were needed for.
        text: what the model wrote.
        error: why the answer could not be judged; it counts as wrong.
    """

    value: float
    weight: float = 1.0
    text: str = ""
    error: str | None = None


@contract(
    "eval.task",
    law="the same seed gives the same samples, another one others, no question twice; what is held out never stands in "
    "the part to train on, nor before a question; a reference is right, and another question's, an empty or a hostile "
    "text is wrong; where answers are predicted, each token's log-probability is transformers' to 1e-4, and the result "
    "is theirs in bits per byte",
)
class Task(Policy):
    """Asks a number of seeded questions.

    Attributes:
        samples: how many.
        seed: of the questions.
        part: ``held_out``, or ``train`` for questions to train on, of which none is held out.
    """

    samples: PositiveInt = 100
    seed: int = 0
    part: Part = "held_out"

    metric: ClassVar[str]
    better: ClassVar[Literal["higher", "lower"]]

    def draw(self) -> list[Sample]:
        """The samples."""
        raise NotImplementedError

    def holds_out(self, key: str) -> bool:
        """Whether questions with this :attr:`Sample.key` are held out."""
        return is_held_out(key, HELD_OUT)

    @classmethod
    def example(cls) -> Task:
        """One that is quickly drawn, for the law."""
        return cls(samples=8)

    def ask(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
    ) -> tuple[list[int], SamplingParams]:
        """The tokens of a sample's prompt, and what is wanted of them. With ``chat``, what the model shall write is
        asked for by the model's chat template."""
        raise NotImplementedError

    def outcome(self, sample: Sample, output: RequestOutput) -> Outcome:
        """What the engine's ``output`` for the sample is worth."""
        raise NotImplementedError


class Written(Task):
    """A task of which the model writes the answer, by greedy decoding; the metric is the share that is right.

    Attributes:
        shots: questions with their answers that stand before each question; they are of the part to train on.
    """

    shots: NonNegativeInt = Field(3, le=64)

    metric: ClassVar[str] = "accuracy"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    #: Said before the questions to a model that chats.
    instruction: ClassVar[str] = ""
    #: Between questions.
    between: ClassVar[str] = "\n\n"
    #: What ends an answer, where no chat template does.
    stop: ClassVar[tuple[str, ...]] = ("\n\n",)
    #: The longest answer, in tokens.
    longest: ClassVar[int] = 64

    def question(self, draw: np.random.Generator) -> Sample:
        """One question, without others before it."""
        raise NotImplementedError

    def judge(self, sample: Sample, text: str) -> float | Verdict:
        """1 where ``text`` is right, else 0; a verdict that fails where it cannot be judged."""
        raise NotImplementedError

    def draw(self) -> list[Sample]:
        shown = "".join(f"{each.prompt}{each.reference}{self.between}" for each in self.shown())
        asked = self._questions(self.samples, self.part, self.part)
        return [dataclasses.replace(each, prompt=shown + each.prompt) for each in asked]

    def shown(self) -> list[Sample]:
        """The questions that stand before each question with their answers."""
        return self._questions(self.shots, "train", "shots")

    def _questions(self, count: int, part: Part, stream: str) -> list[Sample]:
        def make(attempt: int) -> Sample:
            return self.question(numpy_generator(self.seed, f"eval/{self.policy_name}/{stream}", attempt))

        what = f"eval.task {self.policy_name!r}"
        return chosen(make, count, lambda sample: self.holds_out(sample.key) == (part == "held_out"), what)

    def ask(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
    ) -> tuple[list[int], SamplingParams]:
        if chat:
            said = f"{self.instruction}\n\n{sample.prompt}".strip()
            prompt = chat_tokens(tokenizer, [{"role": "user", "content": said}])
        else:
            prompt = tokenizer(sample.prompt)["input_ids"]
        # An answer in a chat has words around it.
        longest = self.longest * 4 if chat else self.longest
        return prompt, SamplingParams(temperature=0, max_tokens=longest, stop=() if chat else self.stop)

    def outcome(self, sample: Sample, output: RequestOutput) -> Outcome:
        text = output.outputs[0].text
        verdict = self.judge(sample, text)
        verdict = verdict if isinstance(verdict, Verdict) else Verdict(float(verdict))
        return Outcome(verdict.score, 1.0, text, verdict.error)


class Predicted(Task):
    """A task of which the model is told the answer; the metric is the bits that it needs for each UTF-8 byte of it,
    which does not depend on how text is cut into tokens."""

    metric: ClassVar[str] = "bits per byte"
    better: ClassVar[Literal["higher", "lower"]] = "lower"

    def ask(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False
    ) -> tuple[list[int], SamplingParams]:
        tokens, first = spanned(tokenizer, sample.prompt, sample.reference)
        return tokens, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=first)

    def outcome(self, sample: Sample, output: RequestOutput) -> Outcome:
        assert output.prompt_logprobs is not None
        nats = -math.fsum(output.prompt_logprobs.rows.logprobs)
        return Outcome(nats / math.log(2), float(len(sample.reference.encode())))


def spanned(tokenizer: PreTrainedTokenizerBase, prompt: str, reference: str) -> tuple[list[int], int]:
    """The tokens of ``prompt`` and ``reference`` as one text, and the place of the first one that has a part of the
    reference. A token that lies across the border counts as the reference's, as a whole.

    Raises:
        UsageError: no token stands before the reference: nothing says how probable its first one is.
    """
    read = tokenizer(prompt + reference, return_offsets_mapping=True)
    tokens, offsets = read["input_ids"], read["offset_mapping"]
    first = next((place for place, (_, end) in enumerate(offsets) if end > len(prompt)), len(tokens))
    if first == 0:
        raise UsageError("no token stands before the text that is predicted", hint="Give it a longer prompt.")
    return tokens, first


def chosen(make: Callable[[int], Sample], count: int, fits: Callable[[Sample], bool], what: str) -> list[Sample]:
    """The first ``count`` samples of ``make(0)``, ``make(1)``, ... that fit, none twice.

    Raises:
        ConfigError: there are not so many.
    """
    found: dict[str, Sample] = {}
    last = 0  # the attempt that gave something new
    for attempt in itertools.count():
        if len(found) == count or attempt - last > PATIENCE:
            break
        sample = make(attempt)
        if sample.prompt not in found and fits(sample):
            found[sample.prompt] = sample
            last = attempt
    if len(found) < count:
        raise ConfigError(
            f"{what}: no more than {len(found)} different questions were found, and {count} are wanted",
            hint="Ask for fewer samples, or set options that give more questions.",
        )
    return list(found.values())


def fingerprint(samples: Sequence[Sample]) -> str:
    """What tells whether two evaluations asked the same, in 16 hex digits."""
    text = repr([(each.prompt, each.reference) for each in samples])
    return f"{derive(0, text):016x}"
