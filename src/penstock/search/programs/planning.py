"""Planning-guided decoding: Monte Carlo tree search over tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt

from penstock.policy import policy
from penstock.search.branch import Branch
from penstock.search.contract import Program
from penstock.search.search import Search
from penstock.search.shared.alternatives import turned


@dataclasses.dataclass(eq=False)
class Node:
    """A beginning of a text.

    Attributes:
        text: a whole text that begins so, and is greedy behind it; its score is the value of the beginning.
        length: how many tokens of ``text`` it has.
        prior: the probability of its last token.
        visits: how often it was passed.
        best: the best score of all texts behind it that were tried.
        children: token, probability and node of what is a token longer, without a node where it was not tried; none
            before it is expanded.
        done: whether all that is behind it was tried.
    """

    text: Branch
    length: int
    prior: float
    visits: int = 0
    best: float = -math.inf
    children: list[tuple[int, float, Node | None]] = dataclasses.field(default_factory=list)
    done: bool = False


@policy("search.program", "planning", papers=[92])
class Planning(Program):
    """Grows a tree whose edges are tokens. Each time it goes down from the root along the children with the best upper
    bound (P-UCB: the best score behind the child, plus ``explore`` times its probability under the model, more for
    those that were rarely passed), takes a further token there, completes the text greedily, has it judged, such as by
    public tests, and tells all that it passed. The best text that was tried is the answer.

    From the paper: the planner over the model's own next tokens, with tests as reward, and that both share what they
    computed: here the most probable tokens of each place of a text are those that it came with, and a child on the
    greedy path needs no text of its own. From knowledge: P-UCB, and that the best score, not the mean, is told. Ours:
    texts are completed greedily, that is by a beam of one.

    Attributes:
        rollouts: texts that are judged.
        top: children of a node.
        explore: weight of the bound.
        temperature: of the completions, 0 for greedy; None draws as the search does.
    """

    rollouts: PositiveInt = 16
    top: Annotated[int, Field(ge=1, le=20)] = 4
    explore: NonNegativeFloat = 1.0
    temperature: NonNegativeFloat | None = 0.0

    async def run(self, search: Search) -> Branch | None:
        first = search.root.fork(1, temperature=self.temperature)[0]
        root = Node(first, len(first.tokens), 1.0)
        await search.judge([await first.extend(top=self.top)])
        self._tell([root], first.worth)
        tried = [first]
        while len(tried) < self.rollouts and not root.done:
            line = self._descended(root)
            node = line[-1]
            place = self._chosen(node)
            if place is None:  # the text ends here
                for each in reversed(line):
                    each.done = all(child is not None and child.done for _, _, child in each.children)
                continue
            token, prior, _ = node.children[place]
            text = node.text
            if token != text.tokens[node.length]:
                text = turned(text, node.length, token)
                await search.judge([await text.extend(top=self.top)])
                tried.append(text)
            child = Node(text, node.length + 1, prior)
            node.children[place] = (token, prior, child)
            self._tell([*line, child], text.worth)
        search.notes["rollouts"] = len(tried)
        return search.best(tried)

    def _descended(self, root: Node) -> list[Node]:
        """From the root to a node with a child that was not tried and has the best bound."""
        line = [root]
        while True:
            self._expand(line[-1])
            place = self._chosen(line[-1])
            child = None if place is None else line[-1].children[place][2]
            if child is None:
                return line
            line.append(child)

    def _expand(self, node: Node) -> None:
        if not node.children:
            for token, logprob in node.text.alternatives.get(node.length, ())[: self.top]:
                node.children.append((token, math.exp(logprob), None))

    def _chosen(self, node: Node) -> int | None:
        """The child with the best bound, of those behind which something is left to try; None if there is none."""

        def bound(place: int) -> float:
            _, prior, child = node.children[place]
            visits, best = (child.visits, child.best) if child is not None else (0, 0.0)
            return best + self.explore * prior * math.sqrt(math.log(max(node.visits, 1))) / (1 + visits)

        left = [place for place, (_, _, child) in enumerate(node.children) if child is None or not child.done]
        return max(left, key=bound, default=None)

    def _tell(self, line: list[Node], score: float) -> None:
        for node in line:
            node.visits += 1
            node.best = max(node.best, score)

    @classmethod
    def limit(cls) -> Program:
        return cls(rollouts=1, temperature=None)
