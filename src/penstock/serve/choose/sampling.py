"""How a request's tokens are chosen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from penstock.core.config import Config
from penstock.models.sampling import Sampling
from penstock.policy import Choice
from penstock.serve.decode.contract import Copies, DecodeRule, Token

#: The largest number of continuations of one request.
MOST = 128

#: The largest number of stop strings, and of characters of one.
MOST_STOPS, LONGEST_STOP = 16, 256

#: The largest number of entries of ``stop_tokens`` and of ``logit_bias``.
MOST_TOKENS = 1024

#: The largest number of alternatives whose log-probabilities can be asked for at a position.
MOST_LOGPROBS = 20

#: What changes scores of a text by itself.
APART = (
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "allowed_tokens",
    "bad_words",
    "grammar",
)

#: The largest number of bad words, and of characters or tokens of one.
MOST_BAD, LONGEST_BAD = 1024, 256

#: The largest number of entries of ``allowed_tokens``.
MOST_ALLOWED = 1 << 19

#: The longest text of a grammar, in characters.
LONGEST_GRAMMAR = 1 << 16

#: The longest prediction of an answer, in characters.
LONGEST_PREDICTION = 1 << 20

Penalty = Annotated[float, Field(ge=-2, le=2)]

Biases = dict[Token, Annotated[float, Field(ge=-100, le=100)]]


def _schema_text(value: Any) -> Any:
    """A JSON schema as text, where it is given as what JSON stands for."""
    if not isinstance(value, dict | bool):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from error


#: A bad word, as text or as tokens.
BadWord = (
    Annotated[str, Field(min_length=1, max_length=LONGEST_BAD)]
    | Annotated[tuple[Token, ...], Field(min_length=1, max_length=LONGEST_BAD)]
)

GrammarText = Annotated[str, Field(min_length=1, max_length=LONGEST_GRAMMAR)]


class Grammar(Config):
    """What the whole text must be; exactly one of these is given.

    Attributes:
        json_schema: JSON that conforms to this schema (as text, or as a table).
        regex: a match of this regular expression (Rust's notation: no look-around, no back references).
        ebnf: a text of this grammar, in Lark's notation (``start: ...``) or in GBNF (``root ::= ...``).
        json_object: any JSON object.
        lead: what comes before that text, as rules in Lark's notation of which one is called ``lead``: a thought, on
            which a grammar has no hold.
    """

    json_schema: Annotated[GrammarText | None, BeforeValidator(_schema_text)] = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None
    json_object: bool = False
    lead: GrammarText | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Grammar:
        forms = ("json_schema", "regex", "ebnf", "json_object")
        given = [name for name in forms if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise ValueError(f"a grammar is exactly one of json_schema, regex, ebnf and json_object, not {said}")
        return self


class SamplingParams(Sampling):
    """:class:`~penstock.models.sampling.Sampling` with what a server's users ask for besides.

    A token's score is its logit, changed in this order: ``logit_bias`` is added; ``repetition_penalty``; then
    ``frequency_penalty`` and ``presence_penalty``; then tokens that ``min_tokens``, ``grammar``, ``allowed_tokens`` or
    ``bad_words`` forbid are taken out; then comes ``rule``. Temperature and cuts apply to the scores.

    Attributes:
        n: how many continuations, drawn with the seeds ``seed``, ``seed`` + 1, ...
        best_of: as many are drawn, and the ``n`` whose tokens have the highest mean log-probability are the answer
            (OpenAI's rule); None draws ``n``. The engine gives all of them, with log-probabilities: :func:`best` picks.
        presence_penalty: subtracted from the score of each token that was generated before (OpenAI).
        frequency_penalty: subtracted from a token's score for each time that it was generated before (OpenAI).
        repetition_penalty: divides the score of each token of prompt and continuation where it is positive, and
            multiplies it where it is negative (Keskar et al. 2019, CTRL); 1 changes nothing.
        logit_bias: added to the scores of tokens.
        min_tokens: before so many tokens, nothing ends the text: no token that would comes, and stop strings are text.
        stop: strings that end the text, and are no part of it; they are matched outside of the engine.
        include_stop: the stop string that ended the text is part of it all the same.
        stop_tokens: tokens that end the text, besides the model's own.
        allowed_tokens: no other tokens are generated, not even such as would end the text; None allows all.
        bad_words: none of them is generated, as text or as tokens. What is generated never holds the tokens of one in a
            row; a text stands for two rows of tokens, its own and those that it has behind a space, so that a word that
            is written with other tokens can still come.
        ignore_eos: the model's own end-of-text does not end it.
        logprobs: give each token's log-probability, and those of so many of the most probable tokens; they are the
            model's own, before anything above is applied.
        prompt_logprobs: the same for the tokens of the prompt but the first.
        prompt_logprobs_from: the first token of the prompt, counted from 0, for which they are wanted. What is before
            it may come from the cache, so that a text that grows is scored without computing it anew.
        spread: where log-probabilities are told of a continuation's tokens, tell entropy and self-certainty of their
            distributions too.
        grammar: what the text must be.
        rule: a decoding rule.
        drafts: let the engine draft tokens ahead, where it does so at all. It changes when tokens come, never how they
            are distributed.
        prediction: what the answer is expected to be, as text or tokens: it is drafted from that, where the engine
            drafts at all.
        kv: ``full`` keeps all keys and values of the request, where the engine compresses those of others.
    """

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = 256
    seed: Annotated[int, Field(ge=-(1 << 62), lt=1 << 62)] = 0
    n: Annotated[int, Field(ge=1, le=MOST)] = 1
    best_of: Annotated[PositiveInt, Field(le=MOST)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Biases = Field({}, max_length=MOST_TOKENS)
    min_tokens: NonNegativeInt = 0
    stop: Annotated[tuple[str, ...], Field(max_length=MOST_STOPS)] = ()
    include_stop: bool = False
    stop_tokens: Annotated[tuple[Token, ...], Field(max_length=MOST_TOKENS)] = ()
    allowed_tokens: Annotated[tuple[Token, ...], Field(min_length=1, max_length=MOST_ALLOWED)] | None = None
    bad_words: Annotated[tuple[BadWord, ...], Field(max_length=MOST_BAD)] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt_logprobs_from: NonNegativeInt = 0
    spread: bool = False
    grammar: Grammar | None = None
    rule: Annotated[DecodeRule, Choice("decode.rule")] | None = None
    drafts: bool = True
    prediction: Annotated[str, Field(max_length=LONGEST_PREDICTION)] | tuple[Token, ...] = ()
    kv: Literal["full"] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _can_be_found(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        for text in stop:
            if not 0 < len(text) <= LONGEST_STOP:
                raise ValueError(f"a stop string has 1 to {LONGEST_STOP} characters, and {text[:20]!r} has {len(text)}")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) cannot be less than n ({self.n})")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) cannot be more than max_tokens ({self.max_tokens})")
        if self.min_tokens and self.grammar is not None:
            raise ValueError("min_tokens does not go with a grammar, which itself says where the text can end")
        reason = self.rule.refuses(self) if self.rule is not None else None
        if reason is not None:
            raise ValueError(reason)
        if self.superposes:
            self._check_superposed()
        return self

    def _check_superposed(self) -> None:
        """Refuses what does not go with continuations that are computed in one row."""
        if self.n > MOST_LOGPROBS:
            raise ValueError(f"n is {self.n}, and up to {MOST_LOGPROBS} continuations can be superposed")
        fields = type(self).model_fields
        given = [name for name in APART if getattr(self, name) != fields[name].get_default(call_default_factory=True)]
        if given:
            raise ValueError(
                f"superposed continuations share their scores, as the model tells them: leave out {' and '.join(given)}"
            )

    @property
    def continuations(self) -> int:
        """How many continuations are computed."""
        return self.best_of or self.n

    @property
    def superposes(self) -> bool:
        """Whether all continuations are computed in one row."""
        return self.rule is not None and self.rule.superposes

    @property
    def alternatives(self) -> int | None:
        """How many alternatives the log-probabilities of tokens come with; None where none are needed."""
        if self.superposes:
            return max(self.n, self.logprobs or 0)
        if self.logprobs is None and self.continuations > self.n:
            return 0
        return self.logprobs

    @property
    def penalized(self) -> bool:
        """Whether scores depend on which tokens came before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def companions(self) -> tuple[tuple[int, ...], ...]:
        """The rule's own prompts, for the sequences whose scores it combines with those of this one."""
        return () if self.rule is None else self.rule.companions

    @property
    def again(self) -> Copies | None:
        """How the rule has each token computed again with other experts."""
        return None if self.rule is None else self.rule.again

    def tokenized(self, encode: Callable[[str], list[int]], bare: Callable[[str], list[int]]) -> SamplingParams:
        """The same with all texts that the engine has to know as tokens: the rule's, the prediction, and bad words.

        Args:
            encode: the tokens of a text with those that the model wants around it.
            bare: the tokens of a text alone.
        """
        changed: dict[str, Any] = {}
        if self.rule is not None:
            changed["rule"] = self.rule.tokenized(encode)
        if isinstance(self.prediction, str):
            changed["prediction"] = tuple(encode(self.prediction))
        if any(isinstance(word, str) for word in self.bad_words):
            changed["bad_words"] = tuple(dict.fromkeys(_written(self.bad_words, bare)))
        return self.model_copy(update=changed) if changed else self

    @property
    def waits(self) -> bool:
        """Whether a token can be chosen only once all before it are known to the host."""
        lead = any(len(word) > 1 for word in self.bad_words)
        return self.grammar is not None or lead or (self.rule is not None and self.rule.follows)


def _written(words: Sequence[str | tuple[int, ...]], bare: Callable[[str], list[int]]) -> Iterator[tuple[int, ...]]:
    """The tokens of ``words``: of a text, alone and behind a space."""
    for word in words:
        if isinstance(word, str):
            yield from filter(None, (tuple(bare(word)), tuple(bare(" " + word.lstrip(" ")))))
        else:
            yield word


def best(logprobs: Sequence[Sequence[float]], n: int) -> list[int]:
    """The ``n`` continuations whose tokens have the highest mean log-probability, the best first; of equals, the
    earlier. ``logprobs`` holds those of each continuation's tokens; one without tokens comes last."""
    means = [math.fsum(each) / len(each) if each else -math.inf for each in logprobs]
    return sorted(range(len(means)), key=lambda index: (-means[index], index))[:n]
