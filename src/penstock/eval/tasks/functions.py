"""Small Python functions, completed and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt

from penstock.eval.contract import Sample, Task, Written
from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Verdict
from penstock.search.scorers.sandbox import Limits
from penstock.search.scorers.unit_tests import UnitTests

#: Calls that are tested; the first of them stands in the docstring.
CALLS = 12

#: Of which texts are made.
WORDS = (
    *("river", "stone", "amber", "quiet", "lantern", "of", "the", "window", "paper", "seven", "a", "silver"),
    *("morning", "train", "to", "garden", "ink", "cloud"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """Functions that differ in numbers or letters.

    Attributes:
        name: of the function.
        parameter: its only one, which says what it is called with: see :data:`INPUTS`.
        says: what it returns, with fields ``{a}`` and ``{b}`` for two different numbers and ``{c}`` and ``{d}`` for two
            different letters.
        body: an expression with the same fields.
    """

    name: str
    parameter: str
    says: str
    body: str


FAMILIES = (
    Family("sum_of_multiples", "xs", "the sum of the numbers in xs that are divisible by {a}",
           "sum(x for x in xs if x % {a} == 0)"),
    Family("count_above", "xs", "how many numbers in xs are greater than {a}", "sum(x > {a} for x in xs)"),
    Family("scale_and_shift", "xs", "a list with each number of xs multiplied by {a} and then increased by {b}",
           "[x * {a} + {b} for x in xs]"),
    Family("without_value", "xs", "xs without the numbers that are equal to {a} or to {b}",
           "[x for x in xs if x != {a} and x != {b}]"),
    Family("clamp_all", "xs", "a list with each number of xs, where those above {a} are replaced by {a}",
           "[min(x, {a}) for x in xs]"),
    Family("running_totals", "xs", "the list of running totals of xs, where {a} is added to each of them",
           "[sum(xs[: i + 1]) + {a} for i in range(len(xs))]"),
    Family("remainders", "xs", "the sorted list of the different remainders of the numbers in xs when divided by {a}",
           "sorted({{x % {a} for x in xs}})"),
    Family("pairs_with_sum", "xs", "how many pairs of numbers at different places in xs have the sum {a}",
           "sum(x + y == {a} for i, x in enumerate(xs) for y in xs[i + 1 :])"),
    Family("rotate_left", "xs", "xs rotated to the left by {a} places; an empty list stays empty",
           "xs[{a} % len(xs) :] + xs[: {a} % len(xs)] if xs else []"),
    Family("polynomial", "n", "{a} times the square of n, minus {b} times n", "{a} * n * n - {b} * n"),
    Family("divides_one", "n", "True if n is divisible by {a} or by {b}, but not by both, else False",
           "(n % {a} == 0) != (n % {b} == 0)"),
    Family("digit_sum_remainder", "n", "the remainder of the sum of the decimal digits of n when divided by {a}",
           "sum(int(digit) for digit in str(n)) % {a}"),
    Family("in_base", "n", "the list of the digits of n in base {a}, the least significant digit first",
           "[n // {a} ** i % {a} for i in range(64) if {a} ** i <= n]"),
    Family("word_lengths", "text", "the list of the lengths of the words in text, each of them increased by {a}",
           "[len(word) + {a} for word in text.split()]"),
    Family("count_letters", "text", "how many letters of text are {c!r} or {d!r}",
           "text.count({c!r}) + text.count({d!r})"),
    Family("swap_letter", "text", "text with each {c!r} replaced by {d!r}", "text.replace({c!r}, {d!r})"),
    Family("words_with", "text", "how many words of text contain the letter {c!r}",
           "sum({c!r} in word for word in text.split())"),
    Family("spaced_out", "text", "a string of the characters of text at the places 0, {a}, 2 * {a} and so on",
           "text[::{a}]"),
)  # fmt: skip

INPUTS: dict[str, Callable[[np.random.Generator], Any]] = {
    "xs": lambda draw: draw.integers(0, 21, size=int(draw.integers(0, 9))).tolist(),
    "n": lambda draw: int(draw.integers(1, 1000)),
    "text": lambda draw: " ".join(WORDS[i] for i in draw.integers(len(WORDS), size=int(draw.integers(2, 8)))),
}


@policy("eval.task", "functions")
class Functions(Written):
    """Writes the body of a Python function behind its signature and docstring; it is right if it passes the unit tests,
    which run in the sandbox of ``search.scorer/unit_tests``. Functions are made of families and numbers: those with
    the same numbers are held out together.

    Attributes:
        limits: of each program with its tests.
    """

    shots: NonNegativeInt = Field(1, le=64)
    limits: Limits = Limits()

    instruction: ClassVar[str] = "Complete the last function. Answer with the whole function in a block of Python code."
    between: ClassVar[str] = "\n\n\n"
    stop: ClassVar[tuple[str, ...]] = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n@", "\nassert", "\n\n\n")
    longest: ClassVar[int] = 128

    @classmethod
    def example(cls) -> Task:
        return cls(samples=3, limits=Limits(seconds=2.0))

    def question(self, draw: np.random.Generator) -> Sample:
        family = FAMILIES[int(draw.integers(len(FAMILIES)))]
        a, b = (int(number) + 2 for number in draw.choice(18, size=2, replace=False))
        c, d = (str(letter) for letter in draw.choice(list("aeinorst"), size=2, replace=False))
        fields = {"a": a, "b": b, "c": c, "d": d}
        body, says = family.body.format(**fields), family.says.format(**fields)
        function = eval(f"lambda {family.parameter}: {body}", {})
        given, values = _calls(function, INPUTS[family.parameter], draw)
        head = f'def {family.name}({family.parameter}):\n    """Return {says}.\n\n'
        head += f'    >>> {family.name}({given[0]!r})\n    {values[0]!r}\n    """\n'
        # What is equal to the value, and of another type, is wrong.
        calls = zip(given, values, strict=True)
        tests = [f"assert repr({family.name}({each!r})) == {repr(value)!r}" for each, value in calls]
        problem = {"code": head, "tests": tests}
        return Sample(head, f"    return {body}", f"{family.name} {body}", problem)

    def judge(self, sample: Sample, text: str) -> float | Verdict:
        judge = UnitTests(whole=True, limits=self.limits)
        return judge.score(sample.problem, [Candidate(text, text)])[0]


def _calls(
    function: Callable[[Any], Any], make: Callable[[np.random.Generator], Any], draw: np.random.Generator
) -> tuple[list[Any], list[Any]]:
    """Arguments and values, among which are different ones and some that are not their arguments: no constant and no
    function that does nothing passes."""
    for _ in range(1000):
        given = [make(draw) for _ in range(CALLS)]
        values = [function(each) for each in given]
        if len(set(map(repr, values))) > 1 and values != given:
            return given, values
    raise ValueError("a constant, or a function that does nothing, is as good as a function of this family")
