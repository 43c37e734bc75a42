"""What sequences find of their first tokens, and what they leave for others to find."""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as List

from penstock.ops.paged.residual import Residual
from penstock.serve.engine.memory.blocks import Blocks
from penstock.serve.engine.memory.compression import Compression
from penstock.serve.engine.memory.held import Prefix
from penstock.serve.engine.sequence import Sequence, common


class Prefixes:
    """Finds the blocks that hold the first tokens of a sequence, in the prefix tree or with another sequence, and puts
    full ones into the tree.

    Args:
        blocks: of the cache.
        compression: of caches, of which the tree has nothing.
        kept: those who have ended and hold their blocks.
        residual: the windows in full precision that sequences have.
    """

    def __init__(
        self, blocks: Blocks, compression: Compression, kept: Container[Sequence], residual: Residual | None
    ) -> None:
        self._blocks, self._compression, self._kept, self._residual = blocks, compression, kept, residual

    def root(self, sequence: Sequence) -> int:
        """The node of the tree that ``sequence`` starts from."""
        return self._blocks.pool.root(sequence.adapter.key)

    def reusable(self, sequence: Sequence, dropped: int = 0, compacted: int = 0) -> int:
        """How many of the first tokens may be taken from the cache: not the last, whose scores are wanted, nor those
        after which a log-probability is, nor those whose queries will be asked for. Of a context, nothing is wanted."""
        if sequence.is_context:
            return len(sequence.tokens)
        most = min(len(sequence.tokens) - 1, sequence.exact)
        if sequence.prompt_logprobs is not None:
            most = min(most, sequence.prompt_logprobs_from - 1)
        due = self._compression.due(sequence, compacted, dropped)
        return min(most, due - max(1, self._compression.policy.watches))

    def plain(self, sequence: Sequence) -> int:
        """How many of its first tokens have the keys and values that they have in any text which begins so: not those
        behind contexts that were moved, nor those behind the prompt where these read a part of the cache."""
        selects = self._compression.policy.selection is not None
        return min(sequence.exact, sequence.prompt) if selects else sequence.exact

    def findable(self, sequence: Sequence) -> int:
        """How many of the first tokens may be taken from what any text left."""
        return min(self.reusable(sequence), self.plain(sequence))

    def match(self, sequence: Sequence) -> list[int]:
        """The blocks that the prefix tree has of what a sequence begins with, and may take from there."""
        pieces = sequence.blocks(self._blocks.size, self.findable(sequence))
        return self._blocks.pool.follow(pieces, self.root(sequence))

    def find(self, sequence: Sequence) -> Prefix:
        """Blocks that hold the first tokens of a sequence that waits: those of where it goes on from, or those that the
        prefix tree knows."""
        found, size = self.match(sequence), self._blocks.size
        origin = sequence.origin
        if origin is not None and origin in self._kept:  # one that runs may be about to write to what would be copied
            shared = self.shared(origin, sequence)
            # A context always computes its last token: whether its origin did depends on how far that came.
            if shared.computed > len(found) * size or sequence.is_context:
                return shared
        return Prefix(found, min(len(found) * size, len(sequence.tokens)))

    def shared(self, parent: Sequence, child: Sequence) -> Prefix:
        """The blocks of ``parent`` that hold what ``child`` begins with too."""
        held = parent.held
        assert held is not None
        reusable = self.reusable(child, held.dropped, held.compacted)
        if child.contexts:  # behind them its keys and values are other than its parent's
            reusable = min(reusable, child.shared)
        elif child.is_context:
            reusable = min(reusable, len(child.tokens) - 1)
        computed = max(0, min(held.computed, common(parent.tokens, child.tokens), reusable))
        compressed, own = (
            tuple(place for place in each.compressed if place <= held.compacted) for each in (parent, child)
        )
        other = child.preempted and own != compressed  # what it said was said behind another cache
        unlike = parent.prompt != child.prompt or child.keeps_all
        if held.dropped and (computed < held.compacted or unlike or other):
            return Prefix([], 0)
        blocks = held.blocks[: -(-(computed - held.dropped) // self._blocks.size)]
        return Prefix(blocks, computed, held.dropped, held.compacted, held.known, compressed)

    def needed(self, members: List[Sequence], prefixes: List[Prefix]) -> int:
        """Blocks that ``members`` take beside those of their ``prefixes``, of which the last may have to be copied."""
        size = self._blocks.size
        found = {block for prefix in prefixes for block in prefix.blocks}
        # Rounded up to where the text ends and down to where the prefix does: a block begun there is copied.
        whole = sum(
            -(-(len(each.tokens) - prefix.dropped) // size) - self._used(prefix) // size
            for each, prefix in zip(members, prefixes, strict=True)
            if prefix.computed < len(each.tokens)
        )
        return whole + self._blocks.pool.idle_among(found)

    def _used(self, prefix: Prefix) -> int:
        """From which place on who finds a ``prefix`` computes: where it sees no window of others."""
        places = prefix.computed - prefix.dropped
        if self._residual is None:
            return places
        return self._residual.begin(places, prefix.known if prefix.dropped else 0)

    def catch_up(self, context: Sequence) -> None:
        """A running context takes from the tree what has come there since it was admitted."""
        held, size = context.held, self._blocks.size
        assert held is not None
        if context.remaining and held.computed == len(held.blocks) * size:
            prefix = self.find(context)
            if prefix.computed > held.computed:
                more = prefix.blocks[len(held.blocks) :]
                self._blocks.pool.share(more)
                self._blocks.append(held, more)
                held.computed, held.committed = prefix.computed, len(held.blocks)
                held.node = self._blocks.pool.node_of(held.blocks[-1])

    def commit(self, sequence: Sequence) -> None:
        """Puts the full blocks of known tokens of ``sequence`` into the tree, where they hold all of its tokens; of a
        whole context, which gains no tokens, all blocks."""
        held, size = sequence.held, self._blocks.size
        assert held is not None
        if held.dropped:
            return
        # A block is found by its tokens, of which the newest may be known to the device alone so far.
        known = min(held.computed, len(sequence.tokens), self.plain(sequence))
        if sequence.is_context and sequence.remaining:
            known -= known % size
        for tokens in sequence.blocks(size, known, held.committed):
            held.node = self._blocks.pool.commit(held.node, tokens, held.blocks[held.committed])
            held.committed += 1
