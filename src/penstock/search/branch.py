"""A generation that is under way: it can be extended, forked, scored and dropped."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from penstock.core.errors import UsageError
from penstock.core.randomness import derive

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.search.search import Search, Texts


@dataclasses.dataclass(frozen=True)
class Until:
    """Where an extension ends, if the text does not end before: the first of what is given.

    Attributes:
        tokens: after so many.
        text: after the token that completes one of these strings.
        pattern: after the token with which the extension's text has a match of this regular expression.
    """

    tokens: int | None = None
    text: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None

    def reached(self, text: str) -> bool:
        """Whether the ``text`` of an extension has come there."""
        if any(each in text for each in self.text):
            return True
        return self.pattern is not None and self.pattern.search(text) is not None


#: The end of the text.
END = Until()


@dataclasses.dataclass
class Anchor:
    """A text in the engine's cache that branches go on from: the request ``id`` computed it, and ``users`` branches may
    go on from it. ``model`` is whose cache it is."""

    id: str
    users: int = 1
    model: str = ""


class Branch:
    """A node of the tree that a program grows. It goes on by :meth:`extend`, until it is forked: from then on its
    children do, and it can only be forked again.

    Attributes:
        search: whose branch it is.
        number: its number in the tree, in the order in which branches were made.
        parent: the branch that it was forked from; None of the root.
        start: how many tokens it had when it was made.
        tokens: its tokens, the prompt's too.
        prompt: how many of them were the problem's prompt.
        steps: after how many tokens each extension ended.
        logprobs, entropies, certainties: of each token behind the prompt: its log-probability under the model, and
            entropy and distance from the even distribution of the distribution that it was drawn from; 0 for tokens
            that were appended.
        ended: why the text ended: ``stop``, ``length`` or ``error``; None while it can go on.
        score: what a scorer said last; None before.
        error: why the scorer could not say anything.
        model: which of the search's models it is a text of.
        temperature: that its tokens are drawn at; None for the search's own.
        alternatives: by place, the most probable tokens with their log-probabilities, where an extension asked for
            them.
        appended: how many of the tokens behind the problem's prompt were given, not generated.
        hidden: float32 [tokens, hidden], the hidden states after the model's last norm of the tokens that it had when
            :meth:`~penstock.search.search.Search.hidden` was asked for them; None before.
        fate: for those who look at the tree: ``pruned``, ``kept``, ``answer``, ``aside`` of one that is no answer but a
            question about one, or empty.
        computed: how many tokens of it are computed, or will be with what is under way.
        beside: texts that it reads where they are in the cache: whose, and where they begin and end in its tokens.
        anchor: where the first ``anchored`` of its tokens are in the engine's cache.
    """

    def __init__(
        self, search: Search, tokens: list[int], seed: int, parent: Branch | None = None, model: str = ""
    ) -> None:
        self.search, self.parent, self.seed = search, parent, seed
        self.model: str = model if parent is None else parent.model
        self.temperature: float | None = None if parent is None else parent.temperature
        self.alternatives: dict[int, list[tuple[int, float]]] = {} if parent is None else dict(parent.alternatives)
        self.appended: int = 0 if parent is None else parent.appended
        self.number = len(search.branches)
        self.start, self.tokens = len(tokens), tokens
        self.prompt: int = len(tokens) if parent is None else parent.prompt
        self.steps: list[int] = [] if parent is None else list(parent.steps)
        self.logprobs: list[float] = [] if parent is None else list(parent.logprobs)
        self.entropies: list[float] = [] if parent is None else list(parent.entropies)
        self.certainties: list[float] = [] if parent is None else list(parent.certainties)
        self.ended: str | None = None
        self.cut = 0  # characters of a stop string that are no part of the text
        self.score: float | None = None
        self.error: str | None = None
        self.hidden: Tensor | None = None
        self.fate = ""
        self.computed: int = 0 if parent is None else parent.computed
        self.children = 0
        self.beside: tuple[tuple[Branch, int, int], ...] = ()
        self.anchor: Anchor | None = None
        self.anchored = 0
        self.dropped = False
        search.branches.append(self)
        search.open += 1

    # Looking at it

    @property
    def ancestors(self) -> list[Branch]:
        """What it was forked from, the root first."""
        line: list[Branch] = []
        branch = self.parent
        while branch is not None:
            line.append(branch)
            branch = branch.parent
        return line[::-1]

    @property
    def line(self) -> list[Branch]:
        """Its ancestors, and itself."""
        return [*self.ancestors, self]

    @property
    def texts(self) -> Texts:
        """Between tokens and text of its model."""
        return self.search.voices[self.model].texts

    @property
    def finished(self) -> bool:
        """Whether its text has ended."""
        return self.ended is not None

    @property
    def generated(self) -> list[int]:
        """The tokens behind the prompt: the problem's, or what was asked last."""
        return self.tokens[self.prompt :]

    @property
    def text(self) -> str:
        """The text behind the prompt, the problem's or what was asked last, without what ended it."""
        tokens = self.generated
        if self.closed:
            tokens = tokens[:-1]
        text = self.texts.decode(tokens)
        return text[: len(text) - self.cut]

    @property
    def closed(self) -> bool:
        """Whether its last token is one that ends a text."""
        return self.ended == "stop" and bool(self.generated) and self.tokens[-1] in self.search.voices[self.model].ends

    @property
    def last(self) -> str:
        """The text of the last extension."""
        begun = self.steps[-2] if len(self.steps) > 1 else self.prompt
        return self.texts.decode(self.tokens[begun:])

    @property
    def answer(self) -> str:
        """What its text answers, as the search reads it."""
        return self.search.answer(self.text)

    @property
    def logprob(self) -> float:
        """The log-probability of the text under the model."""
        return sum(self.logprobs)

    @property
    def worth(self) -> float:
        """What programs choose by: its score; -inf where a scorer failed on it, or was not asked."""
        return -math.inf if self.score is None or self.error is not None else self.score

    @property
    def entropy(self) -> float:
        """The mean entropy of the distributions that its tokens were drawn from, in nats; 0 without tokens."""
        return sum(self.entropies) / max(1, len(self.entropies))

    @property
    def certainty(self) -> float:
        """The mean self-certainty of its tokens, in nats; 0 without tokens."""
        return sum(self.certainties) / max(1, len(self.certainties))

    # Growing

    def extend(
        self,
        *,
        step: bool = False,
        tokens: int | None = None,
        text: str | tuple[str, ...] = (),
        pattern: str = "",
        top: int = 0,
    ) -> Awaitable[Branch]:
        """Goes on to the end of the text or, where it is given and comes first, of the next step, of so many
        ``tokens``, of one of the strings ``text``, or of a match of the regular expression ``pattern`` in what is new.
        A text that has ended stays as it is. Where the budget ends it, it is shorter. ``top`` keeps so many of the most
        probable tokens at each place in ``alternatives``.

        Raises:
            UsageError: it was forked, or dropped; or it reads texts beside it, and was extended before.
            BudgetSpentError: when awaited, there is nothing left for a single token.
        """
        if self.children or self.dropped:
            raise UsageError(f"branch {self.number} was {'dropped' if self.dropped else 'forked'}: extend another one")
        if self.beside and self.steps:
            raise UsageError(f"branch {self.number} reads texts beside it, and can be extended once")
        strings = (text,) if isinstance(text, str) else text
        until = Until(
            tokens, (*strings, *((self.search.step,) if step else ())), re.compile(pattern) if pattern else None
        )
        return Extend(self, until, top)

    def fork(self, n: int, *, at: int | None = None, temperature: float | None = None) -> list[Branch]:
        """``n`` branches that go on from here, each in its own way; nothing is computed again for them. The first that
        is ever made draws what this one would have drawn.

        Args:
            at: they go on from its first so many tokens, which have been computed and are no part of the prompt.
            temperature: their tokens are drawn at; this one's own by default.

        Raises:
            UsageError: it was dropped, reads texts beside it, or cannot be cut there; or the search would have too many
                branches open.
        """
        if self.dropped or self.beside:
            why = "was dropped" if self.dropped else "reads texts beside it"
            raise UsageError(f"branch {self.number} {why}, and cannot be forked")
        if at is not None and not self.prompt <= at <= len(self.tokens):
            raise UsageError(
                f"branch {self.number} has {self.prompt} to {len(self.tokens)} tokens to fork at, not {at}"
            )
        if at is not None and at < self.start:
            assert self.parent is not None
            return self.parent.fork(n, at=at, temperature=temperature)
        if at is not None and at < len(self.tokens) > self.computed + 1:
            raise UsageError(f"branch {self.number} has text that is not computed yet: extend it before it is cut")
        taken = int(n > 0 and not self.children)  # its first children are open in its place
        self.search.opens(n - taken)
        self.search.open -= taken
        made = []
        for _ in range(n):
            seed = self.seed if not self.children else derive(self.seed, "search/fork", self.children) >> 1
            child = Branch(self.search, self.tokens[:at], seed, self)
            if at is None or at == len(self.tokens):
                child.ended, child.cut, child.score, child.error = self.ended, self.cut, self.score, self.error
            else:
                child.computed = min(child.computed, at)
                child.steps = [each for each in child.steps if each <= at]
                child.alternatives = {place: top for place, top in child.alternatives.items() if place <= at}
                for each in (child.logprobs, child.entropies, child.certainties):
                    del each[at - self.prompt :]
            if temperature is not None:
                child.temperature = temperature
            if self.anchor is not None:
                self.anchor.users += 1
                child.anchor, child.anchored = self.anchor, min(self.anchored, child.start)
            self.children += 1
            made.append(child)
        self.search.ledger.forks += n
        return made

    def append(self, text: str | list[int]) -> Branch:
        """Adds given ``text``, or tokens, behind what there is; it is computed with the next extension. A text that had
        ended goes on."""
        if self.children or self.dropped:
            raise UsageError(f"branch {self.number} was {'dropped' if self.dropped else 'forked'}: append to another")
        tokens = self.texts.encode(text) if isinstance(text, str) else list(text)
        self.tokens += tokens
        self.appended += len(tokens)
        for each in (self.logprobs, self.entropies, self.certainties):
            each += [0.0] * len(tokens)
        self.search.ledger.prompt += len(tokens)
        self.ended, self.cut = None, 0
        return self

    def ask(self, text: str | list[int]) -> Branch:
        """Adds ``text`` as :meth:`append` does, and from here on reads only what comes behind it: its text, answer and
        log-probability begin anew, and so does the longest text that it may come to."""
        self.append(text)
        self.prompt, self.steps, self.score, self.error = len(self.tokens), [], None, None
        self.logprobs, self.entropies, self.certainties = [], [], []
        return self

    def drop(self, fate: str = "pruned") -> None:
        """Nobody will go on from here: what only it holds is free."""
        self.search.open -= not (self.dropped or self.children)
        self.dropped, self.fate = True, self.fate or fate
        if self.anchor is not None:
            self.search.released(self.anchor)
            self.anchor = None

    def record(self) -> dict[str, Any]:
        """As plain data, for a log and a page: only what its parent does not have."""
        return {
            "number": self.number,
            "parent": None if self.parent is None else self.parent.number,
            "tokens": len(self.tokens) - self.start,
            "text": self.texts.decode(self.tokens[self.start :]),
            "ended": self.ended,
            "score": self.score,
            "error": self.error,
            "logprob": self.logprob,
            "fate": self.fate,
        }


@dataclasses.dataclass(frozen=True)
class Extend:
    """What a program asks for by :meth:`Branch.extend`."""

    branch: Branch
    until: Until
    top: int = 0

    def __await__(self) -> Any:
        return (yield self)
