"""Sums, differences and products."""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np
from pydantic import Field

from penstock.eval.contract import Sample, Written
from penstock.policy import policy

#: A whole number, with commas between thousands or without.
NUMBER = re.compile(r"-?\d[\d,]*")


@policy("eval.task", "arithmetic")
class Arithmetic(Written):
    """Adds, subtracts and multiplies two whole numbers; the last number of the answer must be the result. A question is
    held out together with the one in which the numbers are swapped, and with the other operations on them.

    Attributes:
        digits: of the numbers.
    """

    digits: int = Field(2, ge=1, le=12)

    instruction: ClassVar[str] = "Answer the last question with the number alone."
    between: ClassVar[str] = "\n"
    stop: ClassVar[tuple[str, ...]] = ("\n",)
    longest: ClassVar[int] = 32

    def question(self, draw: np.random.Generator) -> Sample:
        one, other = (int(number) for number in draw.integers(10 ** (self.digits - 1), 10**self.digits, size=2))
        sign = "+-*"[int(draw.integers(3))]
        result = {"+": one + other, "-": one - other, "*": one * other}[sign]
        return Sample(f"Q: What is {one} {sign} {other}?\nA:", f" {result}", f"{min(one, other)} {max(one, other)}")

    def judge(self, sample: Sample, text: str) -> float:
        numbers = NUMBER.findall(text)
        return float(bool(numbers) and numbers[-1].replace(",", "") == sample.reference.strip())
