"""A generative verifier: a model that is asked whether a text is right."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict
from penstock.search.scorers.gathering import Gathered

if TYPE_CHECKING:
    from penstock.serve.offline.llm import LLM


@policy("search.scorer", "generative")
class Generative(Scorer):
    """The chance that a model says yes rather than no when it is asked whether a text is right (a generative verifier,
    Zhang et al. 2024, without a thought before the reply). All texts that wait for it at the same time, of whichever
    problems, are in one continuous batch of an engine of its own, which computes a problem's prompt once. A text that
    it cannot read fails, and so does one of which it says neither.

    Attributes:
        model: a model folder, a boxed model or a hub name.
        question: what stands behind the text; ``yes`` and ``no`` are the replies.
        device: where it runs.
    """

    model: str = Field(examples=["python-1m"])
    question: str = "\n\nIs this right? Yes or no?\n"
    yes: str = "yes"
    no: str = "no"
    device: str = "auto"

    def open(self) -> None:
        _opened(self.model, self.device)

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        from penstock.serve.chat import chat_tokens

        llm, replied = _opened(self.model, self.device)
        prompts = []
        for each in candidates:
            text = (each.text + self.question).encode(errors="replace").decode()
            if "messages" in problem:
                more = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
                prompts.append([*chat_tokens(llm.tokenizer, problem["messages"]), *more])
            else:
                prompts.append(llm.tokens(str(problem.get("prompt", "")) + text))
        most = llm.engine.limits.context - 1
        replies = iter(replied([each for each in prompts if len(each) <= most]))
        found: list[float | Verdict] = []
        for prompt in prompts:
            if len(prompt) > most:
                found.append(Verdict.failure(f"it has {len(prompt)} tokens, and {most} can be read"))
                continue
            found.append(self._chance({llm.tokenizer.decode([token]): each for token, each in next(replies).items()}))
        return found

    def _chance(self, top: Mapping[str, float]) -> float | Verdict:
        """Of yes against no, given the log-probabilities of the most probable replies."""
        one, other = (
            sum(math.exp(logprob) for text, logprob in top.items() if _begins(word, text))
            for word in (self.yes, self.no)
        )
        return one / (one + other) if one + other else Verdict.failure(f"it says neither {self.yes} nor {self.no}")

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        """A model that says one token e^30 times as often as another, whatever it is asked."""
        texts = [Candidate("    return 3\n", ""), Candidate("", ""), Candidate("x", "")]
        scorer = cls(model=_biased().name, yes="return", no="self", device="cpu")
        return scorer, {"prompt": "def f():\n"}, texts, [1.0, 1.0, 1.0]


def _begins(word: str, text: str) -> bool:
    """Whether the token ``text`` begins ``word``."""
    said = text.strip().lower()
    return bool(said) and word.lower().startswith(said)


@functools.cache
def _opened(model: str, device: str) -> tuple[LLM, Gathered[list[int], dict[int, float]]]:
    """The verifier, and what gives the most probable tokens behind texts, with their log-probabilities."""
    from penstock.core.progress import silent
    from penstock.serve.choose.sampling import SamplingParams
    from penstock.serve.offline.llm import LLM

    llm, asking = LLM(model, device=device, progress=silent), SamplingParams(max_tokens=1, temperature=0, logprobs=20)

    def replied(prompts: list[list[int]]) -> list[dict[int, float]]:
        answers = [each.outputs[0].logprobs for each in llm.generate(prompts, asking, progress=silent)]
        return [{token: each.logprob for token, each in tops[0].items()} if tops else {} for tops in answers]

    return llm, Gathered(replied)


@functools.cache
def _biased() -> tempfile.TemporaryDirectory[str]:
    """The folder of the example's model, which is removed at the end of the process."""
    import torch

    from penstock.models import hub

    boxed, folder = hub.resolve("python-1m"), tempfile.TemporaryDirectory(prefix="penstock-verifier-")
    decoder, tokenizer = hub.load(boxed, dtype=torch.float32).requires_grad_(False), hub.load_tokenizer(boxed)
    for name, parameter in decoder.named_parameters():
        parameter.fill_(float("norm" in name))
    # All tokens alike, so that hidden states are ones once they are normed, and a logit is the sum of a row.
    decoder.embedding.weight.fill_(1.0)
    for word, more in (("return", 40.0), ("self", 10.0)):
        (token,) = tokenizer(word)["input_ids"]
        decoder.embedding.weight[token] += more / decoder.config.hidden
    hub.save(decoder, Path(folder.name))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(folder.name) / name).write_bytes((boxed / name).read_bytes())
    return folder
