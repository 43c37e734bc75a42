"""Processes that take orders: what they answer, and what is said of one that does not."""

from __future__ import annotations

import pytest

from penstock.core.errors import PenstockError
from penstock.testing.workers import Workers

#: Answers with its rank and the order, after as many seconds as the order says; or ends.
ECHO = """
import json, os, sys, time
for line in sys.stdin:
    if line.strip() == "end" and os.environ["RANK"] == "1":
        sys.exit(3)
    time.sleep(float(line) if os.environ["RANK"] == "0" else 0)
    print(json.dumps([os.environ["RANK"], line.strip()]), flush=True)
"""

#: Prints by other ways than the answers take.
NOISY = """
import os
from penstock.testing.workers import serve

def orders(world):
    def answer(order):
        print("printed")
        os.system("echo from outside Python")
        return order.upper()
    return answer

serve(orders)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_answers_come_in_the_order_of_ranks_whoever_is_first(script):
    with Workers(script(ECHO), 2) as workers:
        assert workers.ask("0.2") == [["0", "0.2"], ["1", "0.2"]]
        assert workers.ask("0") == [["0", "0"], ["1", "0"]]


def test_one_that_has_ended_is_named_while_others_are_busy(script):
    busy = script(ECHO.replace("float(line)", "3600"))
    with Workers(busy, 2) as workers, pytest.raises(PenstockError, match="rank 1 of the benchmark has failed"):
        workers.ask("end")


def test_one_that_hangs_is_named(script):
    with Workers(script(ECHO), 2) as workers:
        workers.ask("0")
        with pytest.raises(PenstockError, match=r"rank 0 of the benchmark has not answered within 1 s"):
            workers.ask("60", patience=1.0)


def test_whatever_else_is_printed_is_no_answer(script, capfd):
    with Workers(script(NOISY), 1) as workers:
        assert workers.ask("spoken") == ["SPOKEN"]
    assert "from outside Python" in capfd.readouterr().err
