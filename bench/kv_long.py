"""What is found again in prompts of some 2,000 tokens once their cache is compressed: needles, and values of lists.

smollm2 reads Python's standard library, with a line in its midst that has nothing to do with it, or with a list of
pairs there; then the cache is compressed to a quarter, and only then it is asked for what that line says, or for values
of the list. A question is answered right where every token of the answer is the most likely one; beside that stands the
loss of the answers, which also tells apart policies that are all wrong. All texts are generated, the same in each run;
what is to be found stands at depths that divide the prompt evenly.
"""

from __future__ import annotations

import itertools
import statistics

import torch

from penstock.core.bench import Bench, load
from penstock.core.errors import UsageError
from penstock.models import hub
from penstock.serve.engine.engine import Engine

kv = load("kv")

MODEL, LENGTH, BUDGET = "smollm2", 1920, 0.25
#: Prompts with a line that is to be found, and with a list.
NEEDLES, LISTS = 8, 8
QUICK_MODEL, QUICK_LENGTH = "python-6m", 256
#: Tokens that questions and their answers take at most.
ASKED = 192


def hidden(name: str, length: int, todo: list[kv.Question]) -> list[kv.Question]:
    """Questions about what is given with each of them, hidden in code so that ``length`` tokens are read in all: that
    of the first near the beginning, that of the last near the end."""
    found = []
    for number, (text, each) in enumerate(zip(kv.texts(name, len(todo), length), todo, strict=True)):
        around = length - each.given
        depth = int((number + 0.5) / len(todo) * around)
        prompt = [*text[:depth], *each.prompt[: each.given], *text[depth:around], *each.prompt[each.given :]]
        answers = [slice(answer.start + around, answer.stop + around) for answer in each.answers]
        found.append(kv.Question(prompt, length, answers))
    return found


def needles(name: str, count: int) -> list[kv.Question]:
    """So many comments about where somebody lives, and the question where that is."""
    tokenizer, found = hub.load_tokenizer(hub.resolve(name)), []
    people = zip(itertools.cycle(kv.NAMES), itertools.cycle(kv.CITIES[::-1]), strict=False)
    for who, where in itertools.islice(people, count):
        line, question, answer = (
            tokenizer(each, add_special_tokens=False)["input_ids"]
            for each in (f"\n# The home of {who} is in {where}.\n", f"\n# The home of {who} is in", f" {where}")
        )
        begin = len(line) + len(question)
        found.append(kv.Question([*line, *question, *answer], len(line), [slice(begin, begin + len(answer))]))
    return found


def measured(bench: Bench, engine: Engine, name: str, what: str, setting: str, todo: list[kv.Question]) -> None:
    """Rows of the policy ``name`` for the questions that there are ``todo``."""
    right, lost = kv.recall(engine, todo)
    asked = {"subject": name, "setting": setting}
    bench.row(**asked, metric=f"recalled {what}", unit="", value=statistics.fmean(right))
    bench.row(**asked, metric=f"loss of recalled {what}", unit="nats", better="lower", value=statistics.fmean(lost))


def main(bench: Bench) -> None:
    """Measures the full cache and each policy that has a budget.

    Raises:
        UsageError: it is to run elsewhere than on the CPU.
    """
    if bench.device.type != "cpu":
        raise UsageError("the benchmark kv_long runs on the CPU", hint="Leave --device out, or say --device cpu.")
    name, length = (QUICK_MODEL, QUICK_LENGTH) if bench.quick else (MODEL, LENGTH)
    count, lists = (2, 2) if bench.quick else (NEEDLES, LISTS)
    model = hub.load(name, device=bench.device, dtype=torch.float32).eval()
    setting = f"{name}, {length:,} tokens read, {BUDGET:.0%} kept"
    lines = hidden(name, length, needles(name, count))
    listed = hidden(name, length, kv.questions(name, lists, kv.PAIRS))
    for policy, options in {"full": {"name": "full"}, **kv.policies(BUDGET)}.items():
        engine = kv.opened(model, {"kv": options}, 2 * (length + ASKED))
        measured(bench, engine, policy, "needles", setting, lines)
        measured(bench, engine, policy, f"values of {kv.PAIRS} pairs", setting, listed)
