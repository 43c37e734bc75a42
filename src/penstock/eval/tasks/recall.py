"""Finding a value in a long table."""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt

from penstock.eval.contract import Sample, Written
from penstock.policy import policy

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@policy("eval.task", "recall")
class Recall(Written):
    """Says the value of a key that stood somewhere in a long table of keys and values (the task of Liu et al. 2023,
    Lost in the Middle, on shorter names); the first number of the answer must be the value.

    Attributes:
        pairs: lines of the table, each of about ten tokens.
    """

    pairs: int = Field(64, ge=2, le=100_000)
    shots: NonNegativeInt = Field(0, le=8)

    instruction: ClassVar[str] = "Answer with the number alone."
    stop: ClassVar[tuple[str, ...]] = ("\n",)
    longest: ClassVar[int] = 12

    def question(self, draw: np.random.Generator) -> Sample:
        keys: dict[str, int] = {}
        while len(keys) < self.pairs:
            keys[_name(draw)] = int(draw.integers(1000, 10_000))
        wanted = list(keys)[int(draw.integers(self.pairs))]
        table = "".join(f"The number of {key} is {value}.\n" for key, value in keys.items())
        prompt = f"{table}\nQuestion: what is the number of {wanted}?\nAnswer: The number of {wanted} is"
        return Sample(prompt, f" {keys[wanted]}", prompt)

    def judge(self, sample: Sample, text: str) -> float:
        numbers = re.findall(r"\d+", text)
        return float(bool(numbers) and numbers[0] == sample.reference.strip())


def _name(draw: np.random.Generator) -> str:
    """Three syllables."""
    letters = (letters[int(draw.integers(len(letters)))] for _ in range(3) for letters in (CONSONANTS, VOWELS))
    return "".join(letters)
