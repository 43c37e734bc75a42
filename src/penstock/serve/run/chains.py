"""Drafting chains: a token in each pass, for all sequences of a batch together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as List

import numpy as np
from torch import Tensor

from penstock.serve.choose.proposals import ProposingSampler
from penstock.serve.choose.sampler import Sampled, Sampler
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.drafted import Drafted
from penstock.serve.engine.sequence import Sequence

#: Whether more is drafted behind some entries, by the tokens int64 [N] that were drafted for them and the rows of the
#: pass that they were drafted in.
Going = Callable[[list[Entry], Tensor, List[int]], list[bool]]


#: All passes of some entries, up to where each is wanted: what was drafted behind each; none where passes have to be
#: asked for one by one.
Onward = Callable[[list[Entry], np.ndarray, dict[int, int]], list[tuple[Entry, list[int]]]]


class Chains:
    """Drafts one token for a place."""

    def grow(
        self,
        compute: Callable[[list[Entry], np.ndarray, int], tuple[list[Entry], Sampled | None]],
        sampler: Sampler,
        first: list[Entry],
        wanted: dict[int, int],
        tables: np.ndarray,
        going: Going | None = None,
        onward: Onward | None = None,
    ) -> Drafted:
        """What is drafted behind the scored entries of ``first``.

        Args:
            compute: queues the pass for some entries that drafts the token at a depth; which of them are scored, in
                the order of their tokens.
            sampler: chooses the tokens of a pass.
            first: what the first pass computes.
            wanted: how far the texts are to go, by slot, in tokens that have to be computed here.
            tables: the blocks of each slot.
            going: says behind which entries there are to be more; None is all of them.
            onward: computes all passes at once, where the host has to see nothing of what they draft.
        """
        drafted, open_ = Drafted(), first
        # Where the host has to see each token, or has it at no cost, it is read at once; else all of them at the end.
        on_host = going is not None or any(entry.sequence.sampling.waits for entry in open_)
        queued: list[tuple[list[Entry], Sampled]] = []
        depth = 0
        rest: list[tuple[Entry, list[int]]] = []
        while open_:
            if onward is not None and not on_host and (rest := onward(open_, tables, wanted)):
                break
            scored, sampled = compute(open_, tables, depth)
            if sampled is None:
                break
            _write_down(sampler, scored, drafted)
            queued.append((scored, sampled))
            at_once = on_host or sampled.ready is None
            if at_once:
                _read([queued.pop()], drafted)
            more = [True] * len(scored) if going is None else going(scored, sampled.tokens, range(len(scored)))
            pairs = zip(scored, more, strict=True)
            open_ = [_next(entry) for entry, on in pairs if on and entry.start + entry.count < wanted[entry.slot]]
            open_ = [entry for entry in open_ if not at_once or _goes_on(entry.sequence)]
            depth += 1
        _read(queued, drafted)
        for entry, tokens in rest:
            window = drafted.windows.setdefault(entry.slot, [])
            for token in tokens:
                if window and window[-1] in entry.sequence.stop:
                    break
                window.append(token)
        for slot, own in drafted.rows.items():
            del own[len(drafted.windows[slot]) :]
        drafted.drafts = [[-1] for _ in range(sum(map(len, drafted.chances)))]
        for slot, own in drafted.rows.items():
            for row, token in zip(own, drafted.windows[slot], strict=True):
                drafted.drafts[row] = [token]
        return drafted


def _write_down(sampler: Sampler, scored: List[Entry], drafted: Drafted) -> None:
    if isinstance(sampler, ProposingSampler):
        for row, entry in enumerate(scored, sum(map(len, drafted.chances))):
            drafted.rows.setdefault(entry.slot, []).append(row)
        drafted.chances.append(sampler.proposed)


def _next(entry: Entry) -> Entry:
    """The token behind ``entry``, alone."""
    return Entry(entry.sequence, entry.slot, entry.start + entry.count, 1, 1)


def _goes_on(sequence: Sequence) -> bool:
    """Whether the last token did not end the text."""
    failed = sequence.matcher is not None and sequence.matcher.failed
    return sequence.tokens[-1] not in sequence.stop and not failed


def _read(queued: Iterable[tuple[list[Entry], Sampled]], drafted: Drafted) -> None:
    """The host learns which tokens were drafted; their sequences go on by them, up to one that ends the text."""
    for scored, sampled in queued:
        sampled.wait()
        for entry, token in zip(scored, sampled.tokens.tolist(), strict=True):
            sequence, window = entry.sequence, drafted.windows.setdefault(entry.slot, [])
            if window and not _goes_on(sequence):
                continue
            window.append(token)
            sequence.tokens.append(token)
            if sequence.matcher is not None:
                sequence.matcher.consume(token)
