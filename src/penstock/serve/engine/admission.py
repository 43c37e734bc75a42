"""What a request must be for an engine to take it in."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.errors import UsageError
from penstock.serve.choose.restriction import restriction_of
from penstock.serve.choose.sampling import SamplingParams
from penstock.serve.engine.limits import Limits
from penstock.serve.kv.reuse.contract import Reuse
from penstock.serve.messages import Request


class Admission:
    """Refuses requests that an engine cannot compute, before anything is made of them.

    Args:
        limits: what the engine can hold, and for which model.
        reuse: how contexts of requests are encoded.
    """

    def __init__(self, limits: Limits, reuse: Reuse) -> None:
        self._limits, self._reuse = limits, reuse

    def check(self, request: Request) -> None:
        """Refuses a request that cannot be computed.

        Raises:
            UsageError: its prompt is empty, too long or has unknown tokens, its sampling names unknown tokens, or it
                wants what does not go together.
        """
        vocabulary, sampling = self._limits.model.vocabulary, request.sampling
        if request.given is not None and not 0 < request.given <= len(request.prompt):
            raise UsageError(f"{request.given} tokens of a prompt of {len(request.prompt)} cannot count as given")
        if request.keep and (sampling.continuations > 1 or sampling.companions):
            raise UsageError("only a request with one continuation, whose rule has no prompts of its own, can be kept")
        if not request.prompt:
            raise UsageError("the prompt is empty", hint="Give at least one token to continue.")
        if len(request.prompt) >= self._limits.context:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens, and a sequence can have {self._limits.context} with "
                "what follows"
            )
        self.check_tokens(request.prompt, "the prompt has a token that")
        for prompt in sampling.companions:
            self.check_tokens(prompt, "the rule's prompt has a token that")
        self._copied(sampling)
        if sampling.superposes and sampling.n > vocabulary:
            raise UsageError(f"n is {sampling.n}, and a vocabulary of {vocabulary} has too few tokens to superpose")
        self.check_tokens(
            () if isinstance(sampling.prediction, str) else sampling.prediction, "the prediction has a token that"
        )
        words = [token for word in sampling.bad_words if not isinstance(word, str) for token in word]
        allowed = sampling.allowed_tokens or ()
        named = max([*sampling.logit_bias, *sampling.stop_tokens, *allowed, *words], default=0)
        if named >= vocabulary:
            raise UsageError(
                f"logit_bias, stop_tokens, allowed_tokens or bad_words name the token {named}, which is outside of the "
                f"vocabulary of {vocabulary}"
            )
        restriction_of(sampling, (), vocabulary)
        if sampling.kv is not None and self._limits.selection is not None:
            raise UsageError(
                f"kv {sampling.kv!r} is for caches that are compressed, and here tokens behind the prompt read a part "
                "of a cache that stays whole",
                hint="Leave kv out.",
            )
        if not sampling.prompt_logprobs_from < len(request.prompt) + (sampling.prompt_logprobs is None):
            first, length = sampling.prompt_logprobs_from, len(request.prompt)
            raise UsageError(f"prompt_logprobs_from is {first}, and the prompt has {length} tokens")

    def check_contexts(self, request: Request) -> None:
        """Refuses contexts that cannot be computed.

        Raises:
            UsageError: one is empty or has unknown tokens, they stand behind the whole prompt, or the request wants
                what they do not go together with.
        """
        if not 0 <= request.shared <= len(request.prompt) - 1:
            raise UsageError(
                f"contexts cannot stand behind {request.shared} of the prompt's {len(request.prompt)} tokens: at least "
                "one has to follow"
            )
        for number, context in enumerate(request.contexts):
            if not context:
                raise UsageError(f"context {number} is empty", hint="Leave it out.")
            self.check_tokens(context, f"context {number} has a token that")
        wanted = request.sampling.prompt_logprobs is not None
        if wanted and request.sampling.prompt_logprobs_from <= request.shared:
            raise UsageError(
                "a prompt's log-probabilities are told behind what follows its contexts alone",
                hint="Leave prompt_logprobs (or echo with logprobs) out, or give prompt_logprobs_from, "
                f"{request.shared + 1} or more.",
            )
        if self._reuse.plain:
            return
        sampling = request.sampling
        if request.keep or request.given is not None or sampling.companions or sampling.again is not None:
            raise UsageError(
                "a request with contexts that are encoded apart, or moved, cannot be kept, nor go on from another, nor "
                "have a rule with prompts of its own, or one that has tokens computed again",
                hint="Serve with kv_reuse = prefix, which puts contexts into the prompt.",
            )

    def check_tokens(self, tokens: Sequence[int], what: str) -> None:
        """Refuses tokens that the model does not know.

        Raises:
            UsageError: ``what`` is outside of the vocabulary.
        """
        vocabulary = self._limits.model.vocabulary
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise UsageError(f"{what} is outside of the vocabulary of {vocabulary}")

    def limit(self, request: Request, given: int) -> int:
        """The most tokens of the request's sequences; those of its prompt behind the ``given`` ones are generated.

        Raises:
            UsageError: there is no room for its prompt beside the rule's prompts, or beside its contexts.
        """
        prompt, others = len(request.prompt), [len(each) for each in request.sampling.companions]
        if request.contexts:
            return self._limit_beside(request)
        others = [each + prompt - given for each in others]
        if not others:
            return min(self._limits.context, prompt + request.sampling.max_tokens)
        # All have to fit, each with a last block that may be nearly empty.
        members, size = 1 + len(others), self._limits.block_size
        room = self._limits.blocks * size - members * (size - 1)
        left = min(self._limits.context - max(prompt, *others), (room - prompt - sum(others)) // members)
        if left < 1 or self._limits.sequences < members:
            raise UsageError(
                f"there is no room for the prompt and, beside it, the rule's {sum(others)} tokens of prompts",
                hint="Shorten them, or raise engine.sequences, engine.context and engine.cache_tokens.",
            )
        return prompt + min(left, request.sampling.max_tokens)

    def _limit_beside(self, request: Request) -> int:
        """The same of a request that sees contexts: it stands behind the longest, and all of them have to fit."""
        prompt, size = len(request.prompt), self._limits.block_size
        lengths = [request.shared + len(context) for context in request.contexts]
        room = self._limits.blocks * size - sum(-(-length // size) * size for length in lengths)
        limit = min(self._limits.context - max(map(len, request.contexts)), room, prompt + request.sampling.max_tokens)
        if limit <= prompt or self._limits.sequences <= len(lengths):
            raise UsageError(
                f"there is no room for the prompt's {prompt} tokens beside {len(lengths)} contexts with up to "
                f"{max(lengths) - request.shared} tokens and {request.length - prompt} in all",
                hint="Give fewer or shorter ones, or raise engine.sequences, engine.context and engine.cache_tokens.",
            )
        return limit

    def _copied(self, sampling: SamplingParams) -> None:
        """Refuses a rule that has tokens computed again where they cannot be."""
        if sampling.again is None:
            return
        if self._limits.model.moe is None:
            raise UsageError(
                "the rule has other experts chosen, and this model has no experts",
                hint="Leave out the rule, or serve a mixture of experts.",
            )
        if self._limits.residual is not None:
            raise UsageError(
                "the rule has tokens computed again, and copies have no window in full precision",
                hint="Leave out the rule, or serve without codec.residual.",
            )
        if sampling.again.more >= self._limits.tokens:
            raise UsageError(
                f"a step computes {self._limits.tokens} tokens, too few for {sampling.again.more + 1} copies of one",
                hint="Ask for fewer copies, or raise engine.tokens.",
            )
