"""What a program sees of its problem."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from penstock.core.errors import PenstockError, UsageError
from penstock.core.randomness import derive, numpy_generator
from penstock.search.branch import Anchor, Branch
from penstock.search.ledger import Budget, Ledger

T = TypeVar("T")


class BudgetSpentError(PenstockError):
    """A program asked for tokens, and its budget does not pay for a single one. One that does not catch it has ended:
    the best of what it has is its answer."""


class Stream(Protocol):
    """Reads tokens as they come."""

    def push(self, tokens: Iterable[int]) -> str:
        """The text that ``tokens`` add, as far as it is certain."""
        ...


class Texts(Protocol):
    """Between tokens and text."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that stands behind another."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        ...

    def stream(self, before: Sequence[int]) -> Stream:
        """Reads what comes behind the tokens ``before``."""
        ...


@dataclasses.dataclass(frozen=True)
class Voice:
    """A model that texts of a search are drawn from.

    Attributes:
        texts: between its tokens and text.
        prompt: the problem's, in its tokens.
        ends: tokens that end a text.
        context: the most tokens of prompt and text together.
        apart: whether the engine reads texts beside each other: see :meth:`Search.beside`.
    """

    texts: Texts
    prompt: tuple[int, ...]
    ends: frozenset[int] = frozenset()
    context: int = 1 << 30
    apart: bool = False


class Dice(Protocol):
    """Where a program's own choices come from."""

    def choose(self, weights: Sequence[float]) -> int:
        """A place among ``weights``, each as probable as it weighs."""
        ...


def unknown_model(model: str, known: Iterable[str]) -> UsageError:
    """The error of a program that asks a model which was not given."""
    names = ", ".join(filter(None, known)) or "none"
    return UsageError(
        f"the program asks the model {model!r}, and none was given by that name; known: {names}",
        hint=f"Give it by models={{{model!r}: LLM(...)}}, or on the command line by --model {model}=NAME.",
    )


class SeededDice:
    """Choices that the ``seed`` decides."""

    def __init__(self, seed: int) -> None:
        self._generator = numpy_generator(seed, "search/choices")

    def choose(self, weights: Sequence[float]) -> int:
        """A place among ``weights``, each as probable as it weighs."""
        aim, reached = self._generator.random() * sum(weights), 0.0
        for place, weight in enumerate(weights):
            reached += weight
            if aim < reached:
                return place
        return max(place for place, weight in enumerate(weights) if weight > 0)


class Search:
    """A problem, the tree that a program grows for it, and what that has cost.

    Args:
        problem: what is known of it, for programs and scorers.
        prompt: its tokens.
        texts: between tokens and text.
        seed: of all draws.
        budget: what may be spent.
        most: the longest text, in generated tokens.
        step: what ends a step of the text.
        stop: strings that end a text, and are no part of it.
        answer: reads the answer off a text.
        ends: tokens that end a text.
        context: the most tokens of prompt and text together.
        apart: whether the engine reads texts beside each other.
        others: further models, by name, that a program may ask.
        dice: of the program's own choices.
        released: told of texts in the cache that nobody goes on from.
        width: the most branches that may be open at once; no limit by default.
        scorers: the names of those that were given; the program's own is without a name.

    Attributes:
        root: the branch with nothing but the prompt.
        voices: the models by name; the one without a name is the search's own.
        branches: all branches, by number.
        ledger: what was spent.
        notes: what the program wants to be told beside its answer, as plain data.
        exhausted: whether the budget has ended an extension.
        open: how many branches are neither dropped nor forked.
    """

    def __init__(
        self,
        problem: Mapping[str, Any],
        prompt: Sequence[int],
        texts: Texts,
        *,
        seed: int = 0,
        budget: Budget | None = None,
        most: int = 256,
        step: str = "\n\n",
        stop: Sequence[str] = (),
        answer: Callable[[str], str] = str.strip,
        ends: frozenset[int] = frozenset(),
        context: int = 1 << 30,
        apart: bool = False,
        others: Mapping[str, Voice] | None = None,
        dice: Dice | None = None,
        released: Callable[[Anchor], None] = lambda anchor: None,
        width: int | None = None,
        scorers: Iterable[str] = (),
    ) -> None:
        self.problem, self.step, self.answer = problem, step, answer
        self.voices = {"": Voice(texts, tuple(prompt), ends, context, apart), **(others or {})}
        self.budget, self.most, self.seed, self.stop = budget or Budget(), most, seed, tuple(stop)
        self.ledger = Ledger(prompt=len(prompt))
        self.branches: list[Branch] = []
        self.notes: dict[str, Any] = {}
        self.exhausted = False
        self.open, self._width = 0, width
        self.scorers = frozenset(scorers)
        self.root = Branch(self, list(prompt), seed)
        self._roots = {"": self.root}
        self._dice = dice or SeededDice(seed)
        self._released = released

    def root_of(self, model: str) -> Branch:
        """The branch with nothing but the problem's prompt, of the ``model`` of that name; the search's own is without
        a name.

        Raises:
            UsageError: there is none; the message lists those that there are.
        """
        if model not in self._roots:
            if model not in self.voices:
                raise unknown_model(model, self.voices)
            prompt = list(self.voices[model].prompt)
            self._roots[model] = Branch(self, prompt, derive(self.seed, f"search/model/{model}") >> 1, model=model)
            self.ledger.prompt += len(prompt)
        return self._roots[model]

    def beside(self, branches: Iterable[Branch], text: str) -> Branch:
        """A branch that reads all the texts of ``branches``, each from the root on, and then ``text``; what it is
        extended by stands behind that. Where the engine reads texts beside each other (``kv_reuse = ape``), it reads
        them where they are in the cache: each has its own positions behind the prompt, sees the prompt and itself, and
        nothing of it is computed again but its last token. Such a branch is extended once, and cannot be forked.
        Elsewhere it is a fork of the first, and the other texts are computed anew behind that, one after the other."""
        found = list(branches)
        root, apart = self.root_of(found[0].model), self.voices[found[0].model].apart
        ends = [len(each.tokens) - each.closed for each in found]
        branch = root.fork(1)[0] if apart else found[0].fork(1, at=ends[0])[0]
        seen = []
        for each, end in list(zip(found, ends, strict=True))[not apart :]:
            begin = len(branch.tokens)
            branch.append(each.tokens[len(root.tokens) : end])
            if begin < len(branch.tokens):
                seen.append((each, begin, len(branch.tokens)))
        if apart and seen:
            branch.beside, branch.computed = tuple(seen), len(branch.tokens) - len(seen)
        return branch.ask(text)

    # What a program waits for

    def together(self, works: Iterable[Awaitable[T]]) -> Awaitable[list[T]]:
        """What all ``works`` come to, which are done side by side: extensions, scorings, or coroutines of the program's
        own. They share a round of the budget, which gives each of their branches a token in turn."""
        return Together([each if isinstance(each, Coroutine) else _waiting(each) for each in works])

    async def extend(self, branches: Iterable[Branch], **until: Any) -> list[Branch]:
        """Extends all ``branches`` that have not ended, side by side; see :meth:`Branch.extend`."""
        found = list(branches)
        await self.together(each.extend(**until) for each in found if not each.finished)
        return found

    async def sample(self, n: int, **until: Any) -> list[Branch]:
        """``n`` texts drawn from the model, to their end."""
        return await self.extend(self.root.fork(n), **until)

    def judge(self, branches: Iterable[Branch], scorer: str = "", **known: Any) -> Awaitable[list[Branch]]:
        """Has the scorer set ``branches``' scores, which are given back. One that it fails on has its ``error``, the
        score 0 and the ``worth`` -inf. What is ``known`` stands in place of what the problem says, such as other
        ``tests``."""
        return Judge(self, list(branches), scorer, {**self.problem, **known})

    def work(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """What ``function`` gives for ``arguments``, called in a thread of its own, so that the engine and other
        programs go on meanwhile: for what takes longer than a moment. It must not touch branches."""
        return Work(functools.partial(function, *arguments))

    def hidden(self, branches: Iterable[Branch]) -> Awaitable[list[Branch]]:
        """Sets ``hidden`` of the ``branches``, which are given back: the hidden states of all their tokens after the
        model's last norm. They are computed from the beginning, beside the engine's batch, and charged as that.

        Raises:
            BudgetSpentError: when awaited, what is left does not pay for all of it.
            UsageError: when awaited, the model is shared out among several processes, or has no weights here.
        """
        return States(list(branches))

    def first(self, branches: Iterable[Branch], *, drop: bool = True) -> Awaitable[Branch]:
        """Extends all ``branches`` side by side until the first of them ends, counted in tokens; it is given back, and
        the others are dropped, or stay as they are."""
        return First(list(branches), drop)

    # What it decides by

    def choose(self, weights: Sequence[float]) -> int:
        """A place among ``weights``, each as probable as it weighs."""
        return self._dice.choose(weights)

    def best(self, branches: Iterable[Branch]) -> Branch | None:
        """The one with the highest score, finished ones first, and before all those on which no scorer failed; of
        equals, the earlier. None if there are none."""
        found = list(branches)
        return max(found, key=lambda each: (each.error is None, each.finished, each.worth), default=None)

    @property
    def leaves(self) -> list[Branch]:
        """Branches with an answer that have not been forked, but to ask about them; the roots aside."""
        answers = [each for each in self.branches if each.fate != "aside" and each.parent is not None]
        forked = {each.parent for each in answers}
        return [each for each in answers if each not in forked]

    @property
    def left(self) -> float:
        """What is left of the budget, in its unit."""
        return self.ledger.left(self.budget)

    def opens(self, n: int) -> None:
        """Makes sure that ``n`` more branches may be opened, however fast a program multiplies them.

        Raises:
            UsageError: there would be more than ``width``.
        """
        if self._width is not None and self.open + n > self._width:
            raise UsageError(
                f"the search would have {self.open + n:,} branches open at once, and may have {self._width:,}: "
                "give its program smaller options"
            )

    def room(self, branch: Branch) -> int:
        """How many more tokens ``branch`` may come to."""
        context = self.voices[branch.model].context
        return max(0, min(self.most - len(branch.generated), context - len(branch.tokens)))

    def released(self, anchor: Anchor) -> None:
        """One branch less goes on from ``anchor``."""
        anchor.users -= 1
        if not anchor.users:
            self._released(anchor)


async def _waiting(work: Awaitable[T]) -> T:
    return await work


@dataclasses.dataclass(frozen=True)
class Together:
    """What a program asks for by :meth:`Search.together`."""

    works: Sequence[Coroutine[Any, Any, Any]]

    def __await__(self) -> Any:
        return (yield self)


@dataclasses.dataclass(frozen=True)
class Judge:
    """What a program asks for by :meth:`Search.judge`."""

    search: Search
    branches: list[Branch]
    scorer: str
    problem: Mapping[str, Any]

    def __await__(self) -> Any:
        return (yield self)


@dataclasses.dataclass(eq=False)
class Work:
    """What a program asks for by :meth:`Search.work`; ``outcome`` is what came of it, an exception too."""

    call: Callable[[], Any]
    outcome: Any = None

    def run(self) -> None:
        """Does it."""
        try:
            self.outcome = self.call()
        except Exception as error:
            self.outcome = error

    def __await__(self) -> Any:
        return (yield self)


@dataclasses.dataclass(eq=False)
class States:
    """What a program asks for by :meth:`Search.hidden`; ``outcome`` is what came of it, an exception too."""

    branches: list[Branch]
    outcome: Any = None

    def __await__(self) -> Any:
        return (yield self)


@dataclasses.dataclass(frozen=True)
class First:
    """What a program asks for by :meth:`Search.first`."""

    branches: list[Branch]
    drop: bool = True

    def __await__(self) -> Any:
        return (yield self)
