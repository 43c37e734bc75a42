"""A reward model: a decoder with a scalar head."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from penstock.policy import policy
from penstock.search.scorers.contract import Candidate, Problem, Scorer, Verdict
from penstock.search.scorers.gathering import Gathered


@policy("search.scorer", "reward_model")
class RewardModel(Scorer):
    """What a reward model says of the problem's prompt and a text behind it: the product of its scalar head and the
    hidden state of the last token. Of a text that has not ended it is a process reward, if the model was trained to
    give one. The model is a run of the objective ``reward``, or a folder or hub name that was saved as a sequence
    classifier with one label; texts are read with its own tokenizer, a conversation in its own chat format.

    Texts are computed together, ``batch`` at a time and sorted by length, those of all problems that wait for the model
    at the same time (:mod:`~penstock.search.scorers.gathering`), in process and behind a server. Ours: the scorer
    computes them beside the engine's steps, on the CPU or where ``device`` says, and from their beginning; nothing of a
    text is kept for the next scoring, so that a process reward of k steps reads the text k times.

    Attributes:
        model: a model folder or a hub name.
        batch: texts at a time.
        device: where it runs.
    """

    model: str = Field(examples=["reward-model"])
    batch: PositiveInt = 8
    device: str = "cpu"

    def open(self) -> None:
        _loaded(self.model, self.device)

    def score(self, problem: Problem, candidates: Sequence[Candidate]) -> list[float | Verdict]:
        decoder, tokenizer = _loaded(self.model, self.device)
        most = decoder.config.context
        texts = [_tokens(tokenizer, problem, each) for each in candidates]
        told = iter(_rewarded(self.model, self.device, self.batch)([text for text in texts if len(text) <= most]))
        return [
            next(told) if len(text) <= most else Verdict.failure(f"it has {len(text)} tokens, and {most} can be read")
            for text in texts
        ]

    @classmethod
    def example(cls) -> tuple[Scorer, Problem, list[Candidate], list[float]]:
        """A model whose layers add nothing, with embeddings alike in all places, positive for tokens with an even id
        and negative for others: once they are normed, the reward is their mean, 1 or -1, by the last token."""
        scorer = cls(model=_signs().name)
        tokenizer = _loaded(scorer.model, "cpu")[1]
        texts = [" = 3\n", "return", "a b", "x"]
        wanted = [1.0 - 2.0 * (tokenizer("add" + text)["input_ids"][-1] % 2) for text in texts]
        return scorer, {"prompt": "add"}, [Candidate(text, "") for text in texts], wanted


@functools.cache
def _loaded(model: str, device: str) -> tuple[Any, Any]:
    """Decoder and tokenizer."""
    from penstock.models import hub

    return hub.load_reward(model, device=device), hub.load_tokenizer(model)


@functools.cache
def _rewarded(model: str, device: str, batch: int) -> Gathered[list[int], float]:
    """Gives the rewards of texts, as tokens."""
    import torch

    from penstock.models.attention import CausalRows

    decoder, _ = _loaded(model, device)

    def rewards(texts: list[list[int]]) -> list[float]:
        found = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for begin in range(0, len(order), batch):
            own = order[begin : begin + batch]
            rows = [texts[place] for place in own]
            tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            for row, text in zip(tokens, rows, strict=True):
                row[: len(text)] = torch.tensor(text)
            with torch.inference_mode():
                # Behind a shorter text stands padding, which what comes before it does not see.
                hidden = decoder(tokens.to(device), CausalRows.of(tokens.shape[1], device)).hidden
                last = hidden[torch.arange(len(rows)), torch.tensor([len(text) - 1 for text in rows])]
                told = (last.float() @ decoder.head.weight[0].float()).tolist()
            for place, reward in zip(own, told, strict=True):
                found[place] = reward
        return found

    return Gathered(rewards)


def _tokens(tokenizer: Any, problem: Problem, candidate: Candidate) -> list[int]:
    """What the reward model reads, at least one token: a conversation that has ended as its template writes it whole,
    which is what reward models are trained on."""
    from penstock.serve.chat import chat_tokens

    text = candidate.text.encode(errors="replace").decode()
    if "messages" in problem and candidate.finished:
        whole = [*problem["messages"], {"role": "assistant", "content": text}]
        return chat_tokens(tokenizer, whole, variables={"add_generation_prompt": False})
    if "messages" in problem:
        given = chat_tokens(tokenizer, problem["messages"])
        return [*given, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    tokens: list[int] = tokenizer(str(problem.get("prompt", "")) + text)["input_ids"]
    return tokens or [0]


@functools.cache
def _signs() -> tempfile.TemporaryDirectory[str]:
    """The folder of the example's model, which is removed at the end of the process."""
    import torch

    from penstock.models import hub

    boxed, folder = hub.resolve("python-1m"), tempfile.TemporaryDirectory(prefix="penstock-reward-")
    decoder = hub.load(boxed, dtype=torch.float32).requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        parameter.fill_(float("norm" in name))
    # Large ones, beside which what the norm adds to their square is nothing.
    decoder.embedding.weight += 1024.0 - 2048.0 * (torch.arange(decoder.config.vocabulary) % 2)[:, None]
    decoder.give_scalar_head(seed=0)
    decoder.head.weight.requires_grad_(False).fill_(1 / decoder.config.hidden)
    hub.save(decoder, Path(folder.name))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(folder.name) / name).write_bytes((boxed / name).read_bytes())
    return folder
