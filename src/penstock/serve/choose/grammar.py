"""Grammars at work: which tokens may come next, so that a text is JSON, matches a regex, or derives from rules."""

from __future__ import annotations

import functools
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from penstock.core.errors import UsageError
from penstock.serve.choose.sampling import Grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What compiling a grammar, and one step of it, may cost: tenths of a second and tens of megabytes at most.
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)

#: Between the parts of JSON. It ends, since a weak model would go on with blanks for ever.
WHITESPACE = r"[ \n\r\t]{1,32}"

#: How many compiled grammars are kept for later requests.
KEPT = 64

#: Most characters of a library's message that a person is shown.
LONGEST_REASON = 300


#: A line of a grammar, as the library quotes it.
QUOTED = re.compile(r"^ *(\d+ \|.*|\^)$", re.MULTILINE)


class Matcher:
    """Follows one sequence through a grammar. Where the text is whole, an end-of-text token may come next."""

    def __init__(self, matcher: LLMatcher, words: int, count: int = 0, behind: int = 0) -> None:
        self._matcher, self.words, self._count = matcher, words, count
        # How many ends of text came behind a whole text that nothing can follow. The library takes them and does not
        # count them: going back by one token, it would go back by the one before them.
        self._behind = behind

    @property
    def failed(self) -> bool:
        """Whether it went beyond the limits, or was given a token that it does not allow."""
        return bool(self._matcher.is_error())

    def consume(self, token: int) -> None:
        """Goes on by ``token``."""
        self._count += 1
        self._behind += self._matcher.is_stopped()
        self._matcher.consume_token(token)

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of the first of ``tokens`` could come next, one after the other. Where it stands does not change."""
        return 0 if self.failed else int(self._matcher.validate_tokens(list(tokens)))

    def rollback(self, count: int) -> None:
        """Goes back by the last ``count`` tokens, and no further than to its beginning, before which none were its."""
        count = min(count, self._count)
        self._count -= count
        behind = min(count, self._behind)
        self._behind -= behind
        if count > behind:
            self._matcher.rollback(count - behind)

    def copy(self) -> Matcher:
        """Another one that stands where this one does."""
        return Matcher(self._matcher.deep_copy(), self.words, self._count, self._behind)

    def write_mask(self, row: np.ndarray) -> None:
        """Sets bit i of ``row`` (int32 [words], contiguous) where token i may come next, 32 tokens a word, the least
        significant bit first. Once it failed, any token may come, and is the last."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self.failed:
            row[:] = -1


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of the model; a fast one.
        vocabulary: how many scores the model gives, at least the size of the tokenizer.
        stop: tokens that end a text, besides the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop: Iterable[int] = ()) -> None:
        from llguidance.hf import from_tokenizer

        # A configuration may name an end that the tokenizer does not have: no text comes to it.
        ends = sorted({*stop, tokenizer.eos_token_id} & set(tokenizer.get_vocab().values()))
        size = max(vocabulary, len(tokenizer))
        self._tokenizer: LLTokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=ends or None)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._words = -(-size // 32)

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of ``grammar``.

        Raises:
            UsageError: it is malformed, asks for what cannot be done, or is too large.
        """
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = _compiled(self._tokenizer, grammar)
        self._compiled[grammar] = matcher
        while len(self._compiled) > KEPT:
            self._compiled.popitem(last=False)
        return Matcher(matcher.deep_copy(), self._words)


def _compiled(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    try:
        matcher = LLMatcher(tokenizer, _rules(grammar), limits=LIMITS, log_level=0)
    except (ValueError, LookupError) as error:
        raise _refusal(str(error)) from error
    if not matcher.is_error():
        # The first mask shows whether a step can be done within the limits.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    return matcher


@functools.lru_cache(maxsize=256)
def schema_fault(schema: str) -> str | None:
    """Why no grammar can hold a text to the JSON ``schema``, in one line; None where one can, for all that can be said
    without a model's tokenizer."""
    try:
        rules = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
        matcher = LLMatcher(LLTokenizer("byte"), rules, limits=LIMITS, log_level=0)
    except (ValueError, LookupError) as error:
        return _line(str(error))
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _line(matcher.get_error()) if matcher.is_error() else None


def _line(reason: str) -> str:
    """What the library says of a schema, without the grammar that it quotes and where in it."""
    said = QUOTED.sub("", reason).rpartition("failed to compile JSON schema: ")[2]
    return " ".join(said.split())[:LONGEST_REASON]


def _rules(grammar: Grammar) -> str:
    """``grammar`` in the library's own form, not checked yet."""
    if grammar.json_object or grammar.json_schema is not None:
        schema = grammar.json_schema or '{"type": "object"}'
        answer = LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
    elif grammar.regex is not None:
        answer = grammar_from("regex", grammar.regex)
    else:
        answer = grammar_from("ebnf", grammar.ebnf or "")
    return answer if grammar.lead is None else _behind(grammar.lead, answer)


def _behind(lead: str, answer: str) -> str:
    """The grammar of the rule ``lead`` in ``lead``, and then ``answer``."""
    told = json.loads(answer)["grammars"][0] if answer.startswith('{"grammars"') else {"lark_grammar": answer}
    first = {"lark_grammar": f"start: lead @answer\n{lead}"}
    return json.dumps({"grammars": [first, {**told, "name": "answer"}]})


def _refusal(reason: str) -> UsageError:
    said = reason.strip()[:LONGEST_REASON]
    return UsageError(f"the grammar cannot be used: {said}", hint="Correct or simplify it.")
