"""Decoders that judge whether a document answers a query, by the word with which they would begin their answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.errors import ModelError, UsageError
from penstock.core.files import read_json
from penstock.models.encoders.folder import CONFIG
from penstock.models.encoders.pooling import MODULES
from penstock.serve.choose.logprobs import TokenLogprobs
from penstock.serve.choose.sampling import MOST_LOGPROBS, SamplingParams
from penstock.serve.embed.pair_template import PairTemplate, open_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What judges answer where nothing else is said: that the document is an answer, and that it is none.
ANSWERS = ("yes", "no")

#: What a user is told of a model that is called a reranker.
NO_JUDGE = (
    "the model's folder does not say how it judges documents, so scores and rankings are cosines of vectors, for which "
    "it may not have been trained; give --rerank-template FILE"
)

#: A prompt by its place, and how it is to be continued.
Question = tuple[int, SamplingParams]


@dataclasses.dataclass(frozen=True)
class Judge:
    """How a decoder judges pairs of a query and a document: a template makes a prompt of a pair, and its score is
    p(yes) / (p(yes) + p(no)), of the model's probabilities of two tokens behind the prompt.

    Attributes:
        template: writes pairs.
        yes, no: the tokens.
    """

    template: PairTemplate
    yes: int
    no: int

    def rounds(self, count: int) -> Generator[list[Question], Sequence[TokenLogprobs], list[float]]:
        """How ``count`` prompts are judged: questions for a model, which are asked at once, and for which the first
        token's log-probabilities are sent back in their order; then the next ones. It returns the logits of the scores,
        log p(yes) - log p(no).

        Of most models, both tokens are among the most probable ones, and one round is all; one that is not is asked for
        by itself.
        """
        known: list[dict[int, float]] = [{} for _ in range(count)]
        questions = [(place, _continued(self.yes, self.no)) for place in range(count)]
        while questions:
            for (place, _), told in zip(questions, (yield questions), strict=True):
                known[place] |= dict(told.top) | {told.token: told.logprob}
            both = [(place, token) for place in range(count) for token in (self.yes, self.no)]
            questions = [(place, _continued(token)) for place, token in both if token not in known[place]]
        return [each[self.yes] - each[self.no] for each in known]


def _continued(*tokens: int) -> SamplingParams:
    """Asks for the log-probability of one of ``tokens``, and of the most probable ones."""
    return SamplingParams(
        temperature=0, max_tokens=1, allowed_tokens=tokens, logprobs=MOST_LOGPROBS, ignore_eos=True, drafts=False
    )


def open_judge(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: Path | None = None,
    answers: tuple[str, str] | None = None,
) -> Judge | None:
    """How the decoder in ``folder`` judges; None where neither the arguments nor the folder say so.

    A folder says so in the manner of sentence-transformers, by a module ``LogitScore`` in its ``modules.json``, or in
    vLLM's, by ``classifier_from_token`` in its ``config.json``, the tokens for no and yes; then its chat template
    writes pairs.

    Args:
        template: a file with the template, in place of the folder's.
        answers: the tokens for yes and no, as the vocabulary writes them, in place of the folder's; :data:`ANSWERS`
            where a template is given, and the folder says nothing.

    Raises:
        ModelError: the folder's way is not supported.
        UsageError: there are no such tokens, or the template does not write pairs.
    """
    found = None if answers is None else (_token(tokenizer, answers[0]), _token(tokenizer, answers[1]))
    found = found or _by_modules(folder) or _by_config(folder, tokenizer)
    if found is None and template is None:
        return None
    yes, no = found or (_token(tokenizer, ANSWERS[0]), _token(tokenizer, ANSWERS[1]))
    if yes == no or not 0 <= min(yes, no) <= max(yes, no) < len(tokenizer):
        raise UsageError(f"the tokens {yes} and {no} cannot stand for yes and no", hint="Name two of the vocabulary.")
    return Judge(open_template(folder, tokenizer, template), yes, no)


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    token = tokenizer.get_vocab().get(text)
    if token is None:
        raise UsageError(
            f"the vocabulary has no token {text!r} with which the model could answer",
            hint="Name the tokens for yes and no by --rerank-answers YES,NO, as tokenizer.json writes them.",
        )
    return int(token)


def _table(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}


def _by_modules(folder: Path) -> tuple[int, int] | None:
    """The tokens for yes and no of a module ``LogitScore``."""
    modules = _table(folder / MODULES)
    for each in modules if isinstance(modules, list) else ():
        if isinstance(each, dict) and str(each.get("type")).rpartition(".")[2] == "LogitScore":
            path = folder / str(each.get("path")) / CONFIG
            told = read_json(path)
            yes, no = (told.get(name) if isinstance(told, dict) else None for name in _TOKEN_IDS)
            if not isinstance(yes, int) or not isinstance(no, int):
                raise ModelError(
                    f"{path} has no {' and '.join(_TOKEN_IDS)}, and a score by one token alone is not supported",
                    hint=_ACCEPTED,
                )
            return yes, no
    return None


#: What a user is told whose model scores in another way.
_ACCEPTED = (
    "Accepted are the tokens of two answers, by whose probabilities a model is asked (--rerank-answers YES,NO), and a "
    "classifier with one label."
)

_TOKEN_IDS = ("true_token_id", "false_token_id")


def _by_config(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """The tokens for yes and no of ``classifier_from_token``, which names no first."""
    told = _table(folder / CONFIG)
    named = told.get("classifier_from_token") if isinstance(told, dict) else None
    if named is None:
        return None
    if not isinstance(named, list) or len(named) != 2:
        raise ModelError(
            f"{folder / CONFIG}: classifier_from_token is {named!r}, and two tokens are expected, for no and yes",
            hint=_ACCEPTED,
        )
    return _token(tokenizer, str(named[1])), _token(tokenizer, str(named[0]))
