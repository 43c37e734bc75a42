"""The law of ``eval.task``.

What each clause is there to catch: draws that depend on more than the seed; questions that are asked twice; keys that
do not decide what is held out, so that training shows what evaluation asks; references that their own task calls
wrong; judges that call anything right, or fall over what a model writes; log-probabilities of other tokens than those
of the answer, or of another model.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from penstock.core.progress import silent
from penstock.core.signals import StopRequest
from penstock.eval.contract import Predicted, Task, Written
from penstock.models import hub
from penstock.search.scorers.contract import Verdict
from penstock.serve.offline.llm import LLM

#: Texts that are no answer.
HOSTILE = ("", "\0\ud7ff\u202e", "7" * 5000, "    raise SystemExit", "    import os; os._exit(0)", "(" * 5000)

#: The model of which tokens' probabilities are asked.
MODEL = "python-1m"

#: The largest difference of a log-probability.
CLOSE = 1e-4


def check(task: Task) -> None:
    """Asserts the law, of the policy's own example."""
    example = type(task).example()
    check_draw(example)
    if isinstance(example, Written):
        check_judge(example)
    if isinstance(example, Predicted):
        check_probabilities(example)


def check_draw(task: Task) -> None:
    """Asserts what is said of samples, and of what is held out."""
    drawn = task.draw()
    assert drawn == task.draw(), "the same seed gives other samples"
    assert len(drawn) == task.samples, f"{task.samples} samples are wanted, and {len(drawn)} drawn"
    assert len({each.prompt for each in drawn}) == len(drawn), "a question is asked twice"
    assert all(each.prompt and each.reference for each in drawn), "a question or its answer is empty"
    other = task.model_copy(update={"seed": task.seed + 1}).draw()
    assert not {each.prompt for each in drawn} & {each.prompt for each in other}, "another seed asks the same"
    training = task.model_copy(update={"part": "train"}).draw()
    assert all(task.holds_out(each.key) for each in drawn), "a question is asked that is not held out"
    assert not any(task.holds_out(each.key) for each in training), "a question to train on is held out"
    if isinstance(task, Written):
        shown = task.shown()
        assert len(shown) == task.shots
        assert not any(task.holds_out(each.key) for each in shown), "a question that is held out stands before others"
        assert all(each.reference in sample.prompt for each in shown for sample in drawn)


def check_judge(task: Written) -> None:
    """Asserts that references are right, and everything else is wrong."""
    drawn = task.draw()
    for one, other in zip(drawn, [*drawn[1:], drawn[0]], strict=True):
        assert _score(task.judge(one, one.reference)) == 1, f"the reference {one.reference!r} is wrong"
        if other.reference != one.reference:
            said = _score(task.judge(one, other.reference))
            assert said == 0, f"{other.reference!r} is right, where {one.reference!r} is the answer"
    for text in HOSTILE:
        assert _score(task.judge(drawn[0], text)) == 0, f"{text!r:.40} is right"


def _score(said: float | Verdict) -> float:
    return said.score if isinstance(said, Verdict) else float(said)


def check_probabilities(task: Predicted) -> None:
    """Asserts that the engine charges what transformers does."""
    llm, peer = _models()
    drawn = task.draw()
    asked = [task.ask(sample, llm.tokenizer) for sample in drawn]
    prompts, params = [prompt for prompt, _ in asked], [each for _, each in asked]
    for place, output in llm.as_completed(prompts, params, StopRequest()):
        sample, tokens = drawn[place], prompts[place]
        assert llm.tokenizer.decode(tokens) == sample.prompt + sample.reference, "the prompt is another text"
        before = len(sample.prompt.encode())
        sizes = [len(llm.tokenizer.decode(tokens[: count + 1]).encode()) for count in range(len(tokens))]
        first = next(count for count, size in enumerate(sizes) if size > before)
        with torch.inference_mode():
            scores = peer(torch.tensor([tokens])).logits[0].log_softmax(-1)
        wanted = [float(scores[count - 1, tokens[count]]) for count in range(first, len(tokens))]
        assert output.prompt_logprobs is not None
        said = output.prompt_logprobs.rows.logprobs
        assert len(said) == len(wanted), f"{len(said)} tokens are charged, and {len(wanted)} have a part of the answer"
        apart = max(abs(one - other) for one, other in zip(said, wanted, strict=True))
        assert apart < CLOSE, f"a log-probability is {apart:.2g} from that of transformers"
        outcome = task.outcome(sample, output)
        bits = -math.fsum(wanted) / math.log(2)
        assert math.isclose(outcome.value, bits, abs_tol=CLOSE * len(wanted)), f"{outcome.value} bits, not {bits}"
        assert outcome.weight == len(sample.reference.encode()), "the bytes are not those of the answer"


@functools.cache
def _models() -> tuple[LLM, Any]:
    """The boxed model as the engine has it, and as transformers has it."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(hub.resolve(MODEL), dtype=torch.float32).eval()
    return LLM(MODEL, device="cpu", progress=silent, dtype="fp32"), peer
